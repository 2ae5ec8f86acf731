// The page of `collm serve`: whom it serves, the conversation, the settings.
import { Answer, made, refused } from "./answer.js";
import { FORMS, copy } from "./copy.js";

const at = (id) => document.getElementById(id);
const SIDE_BY_SIDE = "side by side", AS_STARTED = "as the server was started";
const BY = { deferral_rate: "deferral rate", threshold: "threshold" };
let system = null, conversation = [], running = null;

const tell = (text) => { at("told").textContent = text; };

function options(select, choices) {
  select.replaceChildren(...choices.map(([value, text]) => {
    const option = made("option", "", text);
    option.value = value;
    return option;
  }));
}

function headers() {
  const key = at("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

// Whom the server serves.

async function meet() {
  const response = await fetch("v1/collm", { headers: headers() });
  if (!response.ok) { tell(await refused(response)); return; }
  system = await response.json();
  const { pair, models } = system, several = models.length > 1;
  options(at("model"), [pair, ...models, ...(several ? [SIDE_BY_SIDE] : [])].map((name) => [name, name]));
  at("legend").replaceChildren(...models.map((name, z) => {
    const item = made("li");
    item.append(made("span", collmTokens.author(z), name));
    return item;
  }));
  const ways = [["", AS_STARTED]];
  if (several && system.has_gate) ways.unshift(["threshold", BY.threshold]);
  if (several && tables().length) ways.unshift(["deferral_rate", BY.deferral_rate]);
  options(at("by"), ways);
  options(at("task"), tables().map((table) => [table.task, table.task]));
  if (system.defaults.task) at("task").value = system.defaults.task;
  at("examples").replaceChildren(...system.examples.map(example));
  begin();
  if (!system.has_chat_template) tell("the base has no chat template, so it cannot be talked to; its completions can be asked for");
  else tell("");
  way();
}

/** How a rate is reached: as the server was started, else by the gate. */
const dialled = () => (system.defaults.deferral_rate === null ? "threshold" : system.defaults.method);

/** Calibrations of that: what a rate can be given for. */
const tables = () => system.calibration.filter((table) => table.method === dialled());

function example(text) {
  const button = made("button", "example", text);
  button.type = "button";
  button.addEventListener("click", () => { at("question").value = text; ask(); });
  return button;
}

function begin() {
  at("examples").hidden = !system || !system.examples.length || conversation.length > 0;
}

// Who writes.

const alone = () => at("model").value !== system.pair && at("model").value !== SIDE_BY_SIDE;

function way() {
  const by = at("by").value, dial = at("dial"), { defaults } = system;
  let most = 1, value = 0.5;
  if (by === "deferral_rate") {
    const table = tables().find((each) => each.task === at("task").value) ?? tables()[0];
    most = Math.max(...table.rates) || 1;
    value = defaults.deferral_rate ?? table.best_rate ?? most / 2;
  } else if (by === "threshold") {
    value = defaults.threshold ?? 0.5;
  }
  Object.assign(dial, { max: most, step: most / 100, value: Math.min(value, most) });
  at("dial-name").textContent = by ? by[0].toUpperCase() + BY[by].slice(1) : "Deferral rate";
  settle();
}

function settle() {
  const by = at("by").value;
  at("by").disabled = alone();
  at("dial").disabled = alone() || !by;
  at("task-choice").hidden = by !== "deferral_rate" || tables().length < 2;
  const value = Number(at("dial").value);
  at("dial-value").textContent = !by ? "" : by === "deferral_rate" ? `${(100 * value).toFixed(1)} %` : value.toFixed(2);
}

function request(model, messages) {
  const body = {
    model, messages, stream: true, temperature: Number(at("temperature").value),
    max_tokens: Number(at("max-tokens").value) || 256, seed: Number(at("seed").value), collm: { tokens: true },
  };
  const by = at("by").value;
  if (model === system.pair && by) {
    body.collm[by] = Number(at("dial").value);
    if (by === "deferral_rate") body.collm.method = dialled();
    if (by === "deferral_rate" && tables().length > 1) body.collm.task = at("task").value;
  }
  return body;
}

// The conversation.

async function ask(event) {
  event?.preventDefault();
  const question = at("question").value.trim();
  if (!question || running || !system) return;
  conversation.push({ role: "user", content: question });
  const turn = made("section", "turn"), answers = made("div", "answers");
  turn.append(made("div", "said", question), answers);
  at("talk").append(turn);
  at("question").value = "";
  begin();
  const chosen = at("model").value;
  const models = chosen === SIDE_BY_SIDE ? [system.pair, ...system.models] : [chosen];
  const written = models.map((model) => new Answer(system.models, request(model, [...conversation]), headers()));
  answers.append(...written.map((answer) => answer.box));
  turn.scrollIntoView({ block: "nearest" });
  tell("writing");
  const own = running = new AbortController();
  busy(true);
  await Promise.all(written.map((answer) => answer.write(own.signal)));
  for (const answer of written) if (answer.tokens.length) answer.box.append(tools(answer));
  if (running !== own) return; // another conversation has begun
  running = null;
  busy(false);
  // The conversation goes on with the first answer.
  if (written[0].content) conversation.push({ role: "assistant", content: written[0].content });
  else conversation.pop();
  tell(written.map((answer) => `${answer.body.model}: ${answer.tokens.length} tokens`).join("; "));
  at("question").focus({ preventScroll: true });
}

function busy(is) {
  at("send").disabled = is;
  at("stop").disabled = !is;
  at("talk").setAttribute("aria-busy", String(is));
}

/** The buttons below an answer. */
function tools(answer) {
  const row = made("div", "row tools");
  const button = (text, what) => {
    const element = made("button", "", text);
    element.type = "button";
    element.addEventListener("click", what);
    row.append(element);
    return element;
  };
  const compare = button("What the others would have written", async () => {
    compare.disabled = true;
    try {
      await answer.compare();
      tell("the panel of each token tells it");
    } catch (error) {
      compare.disabled = false;
      tell(error.message);
    }
  });
  if (answer.names.length < 2) compare.remove();
  row.append(made("span", "quiet", "Copy as"));
  for (const [name, form] of Object.entries(FORMS)) {
    button(name, async () => {
      try {
        await copy(form(answer));
        tell(`copied as ${name}`);
      } catch {
        tell("the browser does not let this page copy");
      }
    }).setAttribute("aria-label", `Copy as ${name}`);
  }
  return row;
}

function anew() {
  running?.abort();
  running = null;
  busy(false);
  conversation = [];
  collmTokens.show(null);
  at("talk").replaceChildren();
  tell("");
  begin();
}

at("ask").addEventListener("submit", ask);
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
  if (event.key === "Escape") running?.abort();
});
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", anew);
at("model").addEventListener("change", settle);
at("by").addEventListener("change", way);
at("task").addEventListener("change", way);
at("dial").addEventListener("input", settle);
at("key").addEventListener("change", () => meet().catch(silent));

const silent = () => tell("the server does not answer");
meet().catch(silent);
