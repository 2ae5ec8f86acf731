// The page of `collm serve`. What models write is text: it is set as textContent, never as HTML.
"use strict";

const at = (id) => document.getElementById(id);
const SIDE_BY_SIDE = "side by side";
let pair = "pair", names = [], conversation = [], last = null, running = null;

function made(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function refused(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

// Whom the server serves.

async function meet() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) { tell(await refused(response)); return; }
  const found = (await response.json()).data;
  pair = found[0].id;
  names = found[0].models;
  const choices = found.map((model) => model.id);
  if (names.length > 1) choices.push(SIDE_BY_SIDE);
  at("model").replaceChildren(...choices.map((name) => { const o = made("option", "", name); o.value = name; return o; }));
  at("legend").replaceChildren(...names.map((name, z) => made("span", authorClass(z), name)));
  tell("");
}

const authorClass = (z) => (z > 0 ? `author${((z - 1) % 4) + 1}` : "");
const tell = (text) => { at("told").textContent = text; };

// One answer.

function request(model, messages) {
  const body = {
    model, messages, stream: true,
    temperature: Number(at("temperature").value), max_tokens: Number(at("max-tokens").value), seed: 0,
    collm: { tokens: true },
  };
  if (model === pair && names.length > 1) body.collm[at("by").value] = Number(at("dial").value);
  return body;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    let end;
    while ((end = held.indexOf("\n\n")) >= 0) {
      const data = held.slice(0, end).replace(/^data: /, "");
      held = held.slice(end + 2);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function write(model, messages, signal) {
  const box = made("div", "answer");
  const text = made("div", "text"), count = made("p", "count");
  box.append(made("h2", "", model), text, count);
  const answer = { model, body: request(model, messages), content: "", tokens: [], box, done: null };
  const began = performance.now();
  answer.run = (async () => {
    try {
      const response = await fetch("v1/chat/completions",
        { method: "POST", headers: headers(), body: JSON.stringify(answer.body), signal });
      if (!response.ok) throw new Error(await refused(response));
      for await (const event of events(response)) {
        if (event.error) throw new Error(event.error.message);
        for (const choice of event.choices) {
          answer.content += choice.delta.content || "";
          for (const token of choice.collm?.tokens || []) {
            answer.tokens.push(token);
            text.append(shown(token));
          }
          if (choice.finish_reason) answer.done = choice.collm;
        }
        count.textContent = counted(answer, (performance.now() - began) / 1000);
      }
    } catch (error) {
      const stopped = error.name === "AbortError";
      box.append(made("p", stopped ? "count" : "wrong", stopped ? "stopped" : error.message));
    }
    return answer;
  })();
  return answer;
}

function counted(answer, seconds) {
  const by = names.map((name) => `${name} ${answer.tokens.filter((t) => t.author === name).length}`).join(", ");
  const rate = (answer.tokens.length / Math.max(seconds, 0.001)).toFixed(1);
  const passes = answer.done ? `; passes: ${names.map((n) => `${n} ${answer.done.forward_passes[n]}`).join(", ")}` : "";
  return `${answer.tokens.length} tokens (${by}), ${rate} tokens/s${passes}`;
}

// Tokens.

function shown(token) {
  const element = made("span", `token ${authorClass(names.indexOf(token.author))}`, token.text);
  element.tabIndex = -1;
  element.token = token;
  return element;
}

function explain(element) {
  const { token } = element, list = made("dl");
  const row = (name, value) => list.append(made("dt", "", name), made("dd", "", value));
  row("token", JSON.stringify(token.text));
  row("author", token.author);
  row("probability", Math.exp(token.log_prob).toFixed(4));
  if (token.gate) row("gate", Object.entries(token.gate).map(([n, p]) => `${n} ${p.toFixed(3)}`).join(", "));
  if (token.draft) row("draft", token.draft);
  if (token.base_text !== undefined) row("the base would have written", JSON.stringify(token.base_text));
  if (token.fault) row("fault", token.fault);
  at("panel").replaceChildren(list);
  at("panel").hidden = false;
}

const hide = () => { at("panel").hidden = true; };

at("talk").addEventListener("mouseover", (e) => { if (e.target.token) explain(e.target); });
at("talk").addEventListener("mouseleave", hide);
at("talk").addEventListener("focusin", (e) => { if (e.target.token) explain(e.target); });
at("talk").addEventListener("click", (e) => { if (e.target.token) explain(e.target); });
// One stop of the Tab key for each text; the arrows move within it.
at("talk").addEventListener("keydown", (e) => {
  if (e.key === "Escape") { hide(); return; }
  const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
  if (!step || !e.target.token) return;
  const all = [...e.target.parentNode.children];
  const next = all[all.indexOf(e.target) + step];
  if (next) { e.target.tabIndex = -1; next.tabIndex = 0; next.focus(); e.preventDefault(); }
});

// The conversation.

async function ask(event) {
  event?.preventDefault();
  const question = at("question").value.trim();
  if (!question || running) return;
  tell("");
  conversation.push({ role: "user", content: question });
  const turn = made("section", "turn"), answers = made("div", "answers");
  turn.append(made("div", "said", question), answers);
  at("talk").append(turn);
  at("question").value = "";
  running = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  const chosen = at("model").value;
  const models = chosen === SIDE_BY_SIDE ? [pair, ...names] : [chosen];
  const written = [];
  for (const model of models) {
    const answer = await write(model, [...conversation], running.signal);
    answers.append(answer.box);
    written.push(answer);
  }
  turn.scrollIntoView({ block: "nearest" });
  await Promise.all(written.map((answer) => answer.run));
  for (const answer of written) { const first = answer.box.querySelector(".token"); if (first) first.tabIndex = 0; }
  last = written[0];
  if (last.content) conversation.push({ role: "assistant", content: last.content });
  else conversation.pop();
  running = null;
  at("send").disabled = false;
  at("stop").disabled = true;
  at("question").focus();
}

at("ask").addEventListener("submit", ask);
at("question").addEventListener("keydown", (e) => { if (e.key === "Enter" && !e.shiftKey) ask(e); });
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", () => {
  running?.abort();
  conversation = []; last = null;
  at("talk").replaceChildren(); hide(); tell("");
});
at("dial").addEventListener("input", dial);
at("by").addEventListener("change", dial);
at("key").addEventListener("change", meet);

function dial() {
  at("dial-value").textContent = Number(at("dial").value).toFixed(2);
  at("dial-name").textContent = at("by").value === "threshold" ? "Threshold" : "Deferral rate";
}

// Copies.

const escaped = (text) => { const box = made("i", "", text); return box.innerHTML; };

const COPIES = {
  text: (answer) => answer.content,
  json: (answer) => JSON.stringify({ request: answer.body, content: answer.content, tokens: answer.tokens }, null, 2),
  html: (answer) => `<pre>${answer.tokens.map((t) =>
    `<span title="${escaped(t.author).replaceAll('"', "&quot;")}">${escaped(t.text)}</span>`).join("")}</pre>`,
  curl: (answer) => {
    const body = JSON.stringify({ ...answer.body, stream: false }).replaceAll("'", "'\\''");
    const key = at("key").value ? ' -H "Authorization: Bearer $COLLM_API_KEY"' : "";
    return `curl ${location.origin}/v1/chat/completions -H 'Content-Type: application/json'${key} -d '${body}'`;
  },
};

at("copies").addEventListener("click", async (e) => {
  const kind = e.target.dataset.copy;
  if (!kind) return;
  if (!last) { tell("there is no answer to copy yet"); return; }
  try {
    await navigator.clipboard.writeText(COPIES[kind](last));
    tell(`copied as ${kind}`);
  } catch {
    tell("the browser does not let this page copy");
  }
});

meet().catch(() => tell("the server does not answer"));
