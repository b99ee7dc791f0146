"use strict";
// The form that tries a model: it sends what a caller would send, to where the page came from.
const about = JSON.parse(document.getElementById("about").textContent);
const form = document.getElementById("try");
const told = document.getElementById("told");

function shapeOf(value) {
  const shape = [];
  for (let each = value; Array.isArray(each); each = each[0]) shape.push(each.length);
  return shape;
}

function tensor(input, text) {
  const head = { name: input.name, datatype: input.datatype };
  if (text.trim() === "zeros") {
    const count = input.example.reduce((product, size) => product * size, 1);
    return { ...head, shape: input.example, data: Array(count).fill(input.zero) };
  }
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`Input ${input.name} is not JSON: ${error.message}`);
  }
  return { ...head, shape: shapeOf(value), data: Array.isArray(value) ? value.flat(Infinity) : [value] };
}

// 1-d data as nested lists of the shape.
function nested(data, shape) {
  if (shape.length < 2) return data;
  const size = data.length / shape[0];
  return Array.from({ length: shape[0] }, (_, row) => nested(data.slice(row * size, (row + 1) * size), shape.slice(1)));
}

function random(digits) {
  const bytes = crypto.getRandomValues(new Uint8Array(digits / 2));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function show(kind, text) {
  const pre = document.createElement("pre");
  pre.className = kind;
  pre.textContent = text;
  told.append(pre);
}

async function ask() {
  const inputs = about.inputs.map((input, index) => tensor(input, form.elements[`input-${index}`].value));
  const headers = { "content-type": "application/json" };
  const key = form.elements.key.value.trim();
  if (key) headers.authorization = `Bearer ${key}`;
  if (form.elements.trace.checked) headers.traceparent = `00-${random(32)}-${random(16)}-01`;
  const began = performance.now();
  const answer = await fetch(about.path, { method: "POST", headers, body: JSON.stringify({ inputs }) });
  const body = await answer.json();
  const took = (performance.now() - began).toFixed(1);
  if (!answer.ok) throw new Error(`${answer.status}: ${body.error}`);
  for (const output of body.outputs) {
    show("", `${output.name} ${output.datatype} [${output.shape}]\n${JSON.stringify(nested(output.data, output.shape))}`);
  }
  const request = answer.headers.get("x-request-id");
  show("dim", `version ${answer.headers.get("x-lepton-version")}, ${took} ms, request ${request}`);
  const timing = answer.headers.get("server-timing");
  if (timing) show("dim", timing.split(", ").map((each) => each.replace(";dur=", " ") + " ms").join("\n"));
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  told.replaceChildren();
  try {
    await ask();
  } catch (error) {
    show("bad", error.message);
  }
});
form.querySelector("button").disabled = false;
