"use strict";
// A chat over /v1/chat/completions. Nothing is kept on the server; the conversation is in this browser alone.

const at = (id) => document.getElementById(id);
const settings = ["system", "state", "temperature", "max-tokens", "key"];
let messages = JSON.parse(localStorage.getItem("messages") || "[]");
let running = null; // the AbortController of the answer that is being made

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function keep() {
  localStorage.setItem("messages", JSON.stringify(messages));
  for (const id of settings) localStorage.setItem(id, at(id).value);
}

function fail(text) {
  at("error").textContent = text;
  at("error").hidden = !text;
}

// Text with ``` fences as code; always text nodes, so that nothing a model writes becomes markup.
function fill(element, text) {
  element.replaceChildren(...text.split("```").map((part, index) => {
    if (index % 2 === 0) return document.createTextNode(index ? part.replace(/^\n+/, "") : part.replace(/\n+$/, ""));
    const code = document.createElement("code");
    code.textContent = part.replace(/^[^\n]*\n/, "");
    const block = document.createElement("pre");
    block.append(code);
    return block;
  }));
}

function show() {
  const log = at("log");
  log.replaceChildren(...messages.map(({ role, content }) => {
    const article = document.createElement("article");
    article.className = role;
    fill(article, content);
    return article;
  }));
  if (messages.length && !running) log.append(tools());
  log.scrollTop = log.scrollHeight;
  at("send").textContent = running ? "Stop" : "Send";
}

function tools() {
  const row = document.createElement("div");
  row.className = "tools";
  for (const [label, action] of [["Retry", retry], ["Edit", edit]]) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = label;
    button.addEventListener("click", action);
    row.append(button);
  }
  return row;
}

function takeBack() {
  while (messages.length && messages.pop().role !== "user");
}

function retry() {
  const question = messages.findLast((message) => message.role === "user").content;
  takeBack();
  ask(question);
}

function edit() {
  at("question").value = messages.findLast((message) => message.role === "user").content;
  takeBack();
  keep();
  show();
  at("question").focus();
}

async function ask(question) {
  fail("");
  messages.push({ role: "user", content: question });
  const system = at("system").value.trim();
  const body = {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    temperature: Number(at("temperature").value),
    max_tokens: Number(at("max-tokens").value),
    stream: true,
    ...(at("state").value ? { state: at("state").value } : {}),
  };
  const answer = { role: "assistant", content: "" };
  messages.push(answer);
  running = new AbortController();
  show();
  const article = at("log").lastElementChild;
  article.classList.add("streaming");
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error.message);
      answer.content += event.choices[0]?.delta?.content ?? "";
      const low = at("log").scrollHeight - at("log").scrollTop - at("log").clientHeight < 50;
      fill(article, answer.content);
      if (low) at("log").scrollTop = at("log").scrollHeight;
    }
  } catch (error) {
    if (error.name !== "AbortError") fail(error.message);
  }
  running = null;
  if (!answer.content) {
    messages.pop();
    if (!at("error").hidden) at("question").value = messages.pop().content;
  }
  keep();
  show();
}

// The JSON of each "data:" line of an event stream, up to [DONE].
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      yield JSON.parse(line.slice(6));
    }
  }
}

async function lookUp() {
  try {
    const answer = async (path) => {
      const response = await fetch(path, { headers: headers() });
      if (!response.ok) throw new Error((await response.json()).error.message);
      return (await response.json()).data;
    };
    at("model").textContent = document.title = (await answer("v1/models"))[0].id;
    const none = at("state").options[0];
    const wanted = localStorage.getItem("state") || "";
    at("state").replaceChildren(none, ...(await answer("v1/states")).map(({ id }) => new Option(id)));
    at("state").value = wanted;
    if (at("state").selectedIndex < 0) at("state").value = "";
    fail("");
  } catch (error) {
    fail(error.message);
  }
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const question = at("question").value.trim();
  if (!question) return;
  at("question").value = "";
  ask(question);
});
at("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) at("ask").requestSubmit();
});
at("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  keep();
  fail("");
  show();
  at("question").focus();
});
for (const id of settings) {
  at(id).value = localStorage.getItem(id) ?? at(id).value;
  at(id).addEventListener("change", keep);
}
at("key").addEventListener("change", lookUp);
at("settings").addEventListener("submit", (event) => event.preventDefault());
lookUp();
show();
