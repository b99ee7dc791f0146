"use strict";
// Every operation of /v1, from the services' own OpenAPI documents.
const operations = document.getElementById("operations");

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function shown(method, path, operation) {
  const details = document.createElement("details");
  const summary = document.createElement("summary");
  summary.append(element("b", method.toUpperCase()), element("code", path), ` ${operation.summary ?? ""}`);
  details.append(summary, element("p", operation.description ?? ""));
  const { parameters, requestBody, responses } = operation;
  const told = { parameters, requestBody, responses };
  details.append(element("pre", JSON.stringify(told, null, 2)));
  return details;
}

async function read(service) {
  const answer = await fetch(`/v1/openapi/${service}.json`);
  if (!answer.ok) throw new Error(`${service} does not answer`);
  return answer.json();
}

for (const service of operations.dataset.services.split(" ")) {
  const part = document.createElement("div");
  const link = element("a", `/v1/openapi/${service}.json`);
  link.href = link.textContent;
  const title = element("h3", `${service}: `);
  title.append(link);
  part.append(title);
  operations.append(part);
  read(service).then(
    ({ paths }) => {
      for (const [path, methods] of Object.entries(paths)) {
        for (const [method, operation] of Object.entries(methods)) part.append(shown(method, path, operation));
      }
    },
    (error) => part.append(element("p", error.message)),
  );
}
