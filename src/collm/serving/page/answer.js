// One answer on the page: how it arrives, what is counted, what the other models would have written in it.
// What models write is text: it is set as text content, never as HTML.

export function made(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

export async function refused(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
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

/** `names`: the models, base first. `body`: the request. `headers`: those of each request. */
export class Answer {
  constructor(names, body, headers) {
    Object.assign(this, { names, body, headers, content: "", tokens: [], spans: [], collm: null, others: null });
    this.box = made("article", "answer");
    this.box.setAttribute("aria-label", `Answer of ${body.model}`);
    this.text = made("div", "written");
    this.text.dataset.models = JSON.stringify(names);
    this.text.setAttribute("role", "group");
    this.text.setAttribute("aria-label", `Text of ${body.model}, token by token`);
    this.count = made("p", "quiet");
    this.box.append(made("h2", "", body.model), this.text, this.count);
  }

  async write(signal) {
    this.began = performance.now();
    try {
      const response = await fetch("v1/chat/completions",
        { method: "POST", headers: this.headers, body: JSON.stringify(this.body), signal });
      if (!response.ok) throw new Error(await refused(response));
      for await (const event of events(response)) {
        if (event.error) throw new Error(event.error.message);
        for (const choice of event.choices) this.take(choice);
      }
    } catch (error) {
      const stopped = error.name === "AbortError";
      this.box.append(made("p", stopped ? "quiet" : "wrong", stopped ? "stopped" : error.message));
    }
    collmTokens.adopt(this.box);
    return this;
  }

  take(choice) {
    this.content += choice.delta.content || "";
    for (const token of choice.collm?.tokens || []) {
      this.tokens.push(token);
      const span = collmTokens.make(this.fields(token));
      this.spans.push(span);
      this.text.append(span);
    }
    if (choice.finish_reason) this.collm = choice.collm;
    this.count.textContent = this.counted((performance.now() - this.began) / 1000);
  }

  /** A token as tokens.js has it. */
  fields(token) {
    return {
      piece: token.text, author: this.names.indexOf(token.author), log_prob: token.log_prob,
      gate: token.gate && this.names.map((name) => token.gate[name]), base_piece: token.base_text,
      changed: token.base_text !== undefined, abstained: token.abstained, draft: token.draft, fault: token.fault,
      token_pieces: token.token_texts,
    };
  }

  counted(seconds) {
    const by = this.names.map((name) => `${name} ${this.tokens.filter((t) => t.author === name).length}`).join(", ");
    const rate = (this.tokens.length / Math.max(seconds, 0.001)).toFixed(1);
    const told = `${this.tokens.length} tokens (${by}), ${rate} tokens/s`;
    if (!this.collm) return told;
    return `${told}; passes: ${this.names.map((name) => `${name} ${this.collm.forward_passes[name]}`).join(", ")}`;
  }

  /** What each model would have written at every place: asked for once, when somebody wants to know. */
  async compare() {
    if (this.others) return;
    const { messages } = this.body;
    const body = { messages, token_ids: this.tokens.map((token) => token.token_id) };
    const response = await fetch("v1/collm/others",
      { method: "POST", headers: this.headers, body: JSON.stringify(body) });
    if (!response.ok) throw new Error(await refused(response));
    this.others = (await response.json()).tokens;
    const otherwise = this.names.map(() => 0);
    this.others.forEach((place, at) => {
      collmTokens.tell(this.spans[at], this.names.map((name) => place.by_model[name]));
      this.names.forEach((name, z) => {
        const would = place.by_model[name];
        if (!would || would.fault || would.token_id === place.token_id) return;
        otherwise[z] += 1;
        this.spans[at].classList.add("otherwise");
      });
    });
    const told = this.names.map((name, z) => `${name} ${otherwise[z]}`).join(", ");
    this.box.append(made("p", "quiet", `Tokens that each would have written otherwise: ${told} (they have a line above).`));
  }
}
