"""Says which pinned packages have known vulnerabilities, and fails if one has.

pip-audit itself says "none found" of packages that its service knows nothing of, and of none at all.
"""

import json
import subprocess
import sys


def main(constraints: str) -> int:
    command = [sys.executable, "-m", "pip_audit", "--format=json", "--progress-spinner=off"]
    done = subprocess.run(
        [*command, f"--requirement={constraints}", "--no-deps", "--disable-pip"], capture_output=True, text=True
    )
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"not audited, PyPI's advisories cannot be reached: {done.stderr.strip().splitlines()[-1:]}")
        return 0
    unknown = [each["name"] for each in packages if "skip_reason" in each]
    vulnerable = {each["name"]: each["vulns"] for each in packages if each.get("vulns")}
    for name, advisories in vulnerable.items():
        for each in advisories:
            print(f"{name}: {each['id']}, fixed in {', '.join(each['fix_versions']) or 'no release yet'}")
    print(f"{len(packages) - len(unknown)} of {len(packages)} packages audited, {len(vulnerable)} vulnerable")
    if len(unknown) == len(packages):
        print("not audited: this index has no advisories; run it where pypi.org itself is reachable")
    return bool(vulnerable)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
