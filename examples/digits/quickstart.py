"""From a trained model to live predictions: scikit-learn's handwritten digits, pushed to Lepton, served and called.

Then a better version earns its traffic while users go on, and a broken one loses it within seconds. Run it as often as
you like: it starts over with version 1, because the same training gives the same bytes, and those are the same version.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import lepton
import numpy as np
import stamina
from digits import Array, broken, show_digits, split_digits, train, train_better
from lepton.endpoint import home
from lepton.evidence import is_over
from lepton.home import Home
from lepton.report import page
from lepton.rollouts import Rollout, RolloutState
from lepton.watch import looks
from rich.console import Console
from rich.markup import escape
from rich.text import Text
from sklearn.neural_network import MLPClassifier
from users import Users, failed, told
from ways import by_grpc, by_kafka

MODEL = "digits"
BATCH = 50
WANTED_ACCURACY = 0.95
USERS_PER_S = 120
PATIENCE_S = 200
LEPTON = Path(sys.executable).with_name("lepton")
EXAMPLE = Path(__file__).with_name("digit.json")
REPORTS = Path(__file__).with_name("out")

console = Console(highlight=False)


def main() -> None:
    console.print("\n[bold]Lepton: from a trained model to live predictions[/]\n")
    train_images, test_images, train_labels, test_labels = split_digits()

    with step("Train", f"a small neural network on {len(train_images):,} handwritten digits"):
        model = train(train_images, train_labels)
    start_platform()
    with lepton.Client() as client:
        serve(client, model)
        call(client, test_images, test_labels)
        call_otherwise(client, test_images[0], int(test_labels[0]))

        console.print("\n[bold]A better version earns its traffic[/]\n")
        with step("Train", "a larger network, also on images moved by a pixel"):
            better = train_better(train_images, train_labels, seed=len(client.versions(MODEL)) - 1)
        with Users(client.endpoint, MODEL, test_images, test_labels, per_second=USERS_PER_S) as users:
            note(f"Users come from now on: {USERS_PER_S} a second, each with an image it has never seen")
            earned = earn(client, users, better)
            console.print("\n[bold]A broken version loses it[/]\n")
            lost = lose(client, users, better)
        show_reports(client, earned, lost)
        show_what_next(client.endpoint.url)
    if lost.state is RolloutState.PROMOTED:
        sys.exit("The broken version was let through: something in judging it is wrong.")


# --- version 1 --------------------------------------------------------------------------------------------------------


def start_platform() -> None:
    """A platform runs: the one that LEPTON_URL names, the local one, or the local one just started."""
    if "LEPTON_URL" in os.environ:
        return
    console.print("[bold cyan]Start[/] the platform: Kafka, PostgreSQL, etcd, Envoy and Lepton's services")
    started = subprocess.run([LEPTON, "up", "--detach"], check=False)
    if started.returncode:
        sys.exit(started.returncode)  # It has said what is missing.


def serve(client: lepton.Client, model: MLPClassifier) -> None:
    """The model has all traffic, whatever a run before this one left."""
    for rollout in client.rollouts(MODEL):
        if not is_over(rollout):
            client.abort_rollout(rollout.id, reason="the quickstart starts over")
            for _ in looks(client, rollout, poll_s=0.2):
                pass  # Until it has ended.
    with step("Push", f"it as the model {MODEL!r}, and wait until it serves"):
        version = client.push(model, name=MODEL, deploy=False)
        client.deploy(MODEL, version.version)
    note(f"version {version.version}, {version.size_bytes / 1000:.0f} kB of ONNX, sha256 {version.sha256[:12]}…")


def call(client: lepton.Client, images: Array, labels: Array) -> None:
    with step("Call", f"{len(images)} images it has never seen, {BATCH} a request"):
        predicted, confidence = predict_in_batches(client, images)
    accuracy = float(np.mean(predicted == labels))
    note(f"[bold green]{accuracy:.1%}[/] are read right")
    if accuracy < WANTED_ACCURACY:
        sys.exit(f"That is less than {WANTED_ACCURACY:.0%}: something between training and serving is wrong.")

    with step("Time", "the same images one by one, each through gateway, mesh and worker"):
        latencies_ms = time_single_calls(client, images)
    p50, p99 = np.percentile(latencies_ms, [50, 99])
    note(f"p50 [bold]{p50:.1f} ms[/], p99 [bold]{p99:.1f} ms[/], measured in this process")
    show_digits(console, images, labels, predicted, confidence)


def call_otherwise(client: lepton.Client, image: Array, digit: int) -> None:
    """The same model over gRPC and over Kafka, by clients that do not import Lepton."""
    with step("Call", "it over gRPC, with NVIDIA's client"):
        found = by_grpc(urlsplit(client.endpoint.url).netloc, MODEL, image)
    note(f"a {digit} is read as [bold]{found}[/]")
    layout = Home.at(home()).layout()
    if "LEPTON_URL" in os.environ or layout is None or client.endpoint.key is None:
        return  # A platform elsewhere has its Kafka elsewhere.
    with step("Write", "it to the Kafka topic lepton.inference.requests, and read lepton.inference.results"):
        found = by_kafka(layout.kafka.removeprefix("mock://"), client.endpoint.key, MODEL, image)
    note(f"a {digit} is read as [bold]{found}[/]")


def predict_in_batches(client: lepton.Client, images: Array) -> tuple[Array, Array]:
    """The digit the model reads in each image, and how sure it is of it (0 to 1)."""
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    answers = [client.infer(MODEL, {"input": batch}) for batch in batches]
    labels = np.concatenate([answer["label"] for answer in answers])
    probabilities = np.concatenate([answer["probabilities"] for answer in answers])
    return labels, probabilities.max(axis=1)


def time_single_calls(client: lepton.Client, images: Array) -> list[float]:
    latencies_ms = []
    for image in images:
        start = time.perf_counter()
        client.infer(MODEL, {"input": image[np.newaxis]}, outputs=["label"])
        latencies_ms.append((time.perf_counter() - start) * 1000)
    return latencies_ms


# --- the versions after it --------------------------------------------------------------------------------------------


def earn(client: lepton.Client, users: Users, better: MLPClassifier) -> Rollout:
    """The better version has all traffic, after it proved itself."""
    with step("Push", "it, and leave the traffic where it is"):
        version = client.push(better, name=MODEL, deploy=False).version
    before = len(users.answers)
    rollout = follow(client, users, client.start_rollout(MODEL, version, policy="fast"))
    answers = users.answers[before:]
    note(f"Meanwhile users got {len(answers):,} answers: {told(answers)}; failures: [bold]{len(failed(answers))}[/]")
    if rollout.state is not RolloutState.PROMOTED:
        # The judge is wrong about a good version once in twenty rollouts at most; a very busy machine misleads it, too.
        note(f"[yellow]Version {version} is as good as the one before, but it was not let through.[/] Run this again.")
    return rollout


def lose(client: lepton.Client, users: Users, better: MLPClassifier) -> Rollout:
    """The traffic is back on the version that had it, after users of the broken one saw errors."""
    with step("Break", "it on purpose: it knows 8 tones, and images have 17"):
        model = broken(better)
    with step("Push", "it; it loads and warms up like any other"):
        version = client.push(model, name=MODEL, deploy=False).version
    before = len(users.answers)
    rollout = follow(client, users, client.start_rollout(MODEL, version, policy="fast"))
    answers = users.answers[before:]
    bad = failed(answers)
    if bad:
        note(
            f"[bold]{len(bad)}[/] of {len(answers):,} users saw a bad answer,"
            f" the last one [bold]{bad[-1].at_s - bad[0].at_s:.1f} s[/] after the first"
        )
    of_stable = [each for each in answers if each.version != version]
    note(f"Version {rollout.stable} went on: {len(of_stable):,} answers, failures: [bold]{len(failed(of_stable))}[/]")
    return rollout


def follow(client: lepton.Client, users: Users, rollout: Rollout) -> Rollout:
    """The rollout, ended: a line for each share that it had, and below them how it fares now."""
    say("Roll", f"version {rollout.version} out by the policy 'fast': a share at a time, each judged on live traffic")
    start, seen = time.perf_counter(), -1.0
    with console.status("") as status:
        for look in looks(client, rollout, poll_s=0.25):
            rollout = look.rollout
            second = f"[dim]{time.perf_counter() - start:5.1f} s[/]"
            if rollout.percent != seen and not is_over(rollout):
                seen = rollout.percent
                why = rollout.reason if seen else "workers load it"
                note(f"{second}  {seen:3g} % of the users  [dim]{escape(why)}[/]")
            status.update(standing(rollout, users))
            if time.perf_counter() - start > PATIENCE_S and not is_over(rollout):
                client.abort_rollout(rollout.id, reason="the quickstart waits no longer")
    good = rollout.state is RolloutState.PROMOTED
    note(f"{second}  " + ("[bold green]promoted[/]" if good else f"[bold red]taken back[/]  {escape(rollout.reason)}"))
    return rollout


def standing(rollout: Rollout, users: Users) -> Text:
    """How it fares now, in a line: who answers how often, what users saw in the last second, what it waits for."""
    rates = [f"version {arm.version}: {arm.requests_per_s:.0f}/s" for arm in rollout.arms]
    bad = len(failed(users.last(1.0)))
    line = Text("   ".join([*rates, f"errors: {bad}/s", rollout.waiting_for]))
    line.truncate(console.width - 2, overflow="ellipsis")  # The spinner has the rest.
    return line


# --- telling ----------------------------------------------------------------------------------------------------------


def show_reports(client: lepton.Client, *rollouts: Rollout) -> None:
    """Their pages are written."""
    console.print("\n[bold]Read the whole story[/], with plots, in a browser:\n")
    REPORTS.mkdir(exist_ok=True)
    for rollout in rollouts:
        path = REPORTS / f"{MODEL}-v{rollout.version}-rollout.html"
        story = page(rollout, client.decisions(rollout.id), client.rollout_windows(rollout.id))
        path.write_text(story, encoding="utf-8")
        console.print(f"  {os.path.relpath(path)}", soft_wrap=True)


def show_what_next(url: str) -> None:
    command = "lepton" if shutil.which("lepton") else os.path.relpath(LEPTON)
    example = os.path.relpath(EXAMPLE)
    console.print("\n[bold]Call it yourself[/], as any Open Inference Protocol client would:\n")
    console.print(f"  curl {url}/v2/models/{MODEL}/infer -d @{example}", soft_wrap=True)
    console.print("\n[bold]Try next[/]\n")
    for arguments, what in (
        (f"infer {MODEL} --input {example}", "the same call from the command line"),
        ("models", "what is served"),
        (f"timeline {MODEL}", "what happened to it, and when"),
        (f"rollout explain {MODEL}", "why the last version was taken back, each decision with its numbers"),
        (f"rollout replay {MODEL} --policy careful", "what another policy would have decided on the same traffic"),
        (f"rollout start {MODEL} 1 --policy fast", "the way of a version to live traffic; `rollout watch` shows it"),
        ("policy show fast", "the policy by which they came"),
        (f"mesh show {MODEL}", "the routes in the mesh, which `mesh apply` takes over by hand"),
        ("status", "how the platform is"),
        ("down", "end it; its data stays (also: make down)"),
    ):
        console.print(f"  {command} {arguments}", soft_wrap=True)
        console.print(f"      [dim]{what}[/]")
    console.print()


@contextmanager
def step(verb: str, what: str) -> Iterator[None]:
    """Says what is being done, and afterwards how long it took."""
    start = time.perf_counter()
    with console.status(f"[bold cyan]{verb:5}[/] {what}"):
        yield
    say(verb, f"{what} [dim]({time.perf_counter() - start:.1f} s)[/]")


def say(verb: str, what: str) -> None:
    console.print(f"[bold cyan]{verb:5}[/] {what}", soft_wrap=True)


def note(text: str) -> None:
    console.print(f"      {text}", soft_wrap=True)


if __name__ == "__main__":
    stamina.instrumentation.set_on_retry_hooks([])  # Its log would interrupt the story.
    try:
        main()
    except lepton.LeptonError as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped. The platform goes on: `lepton down` ends it.")
