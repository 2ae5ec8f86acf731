"use strict";
/* The panel of a token: who wrote it, how sure it was, what the gate said. It is shown by pointing, by a tap, and by the
   arrow keys in a text that has the focus. Nothing else of a page is needed, so that any page can take this file.

   A text is an element `.written` with spans `.t`; it or an element around it has `data-models`, a JSON list of the
   models' names, the base first. Of a span: `data-a` number of the author (0, the base, if it is missing), `data-l`
   log-probability, `data-g` the gate (a chance for each model, the base first, with spaces between), `data-b` what the
   base would have written, `data-c` of how many of the base's tokens a chunk is, `data-k` these (a JSON list), `data-p` the
   piece itself where it is shown otherwise, `data-d` what became of a draft, `data-f` why an assistant gave no answer,
   `data-o` what each model would have written. Classes: `changed`, `back` (the assistant gave no answer). */
const collmTokens = (() => {
  const COLOURS = 6;
  let panel = null;
  let marked = null;
  let pinned = false;

  function element(tag, className, text) {
    const made = document.createElement(tag);
    made.className = className;
    made.textContent = text;
    return made;
  }

  function author(number) {
    return number > 0 ? "a" + ((number - 1) % COLOURS + 1) : "";
  }

  function quoted(text) {
    return "\u201c" + text.replaceAll("\n", "\u21b5") + "\u201d";
  }

  function percent(value) {
    return value > 0 && value < 0.001 ? "< 0.1 %" : value < 1 && value > 0.999 ? "> 99.9 %" : (100 * value).toFixed(1) + " %";
  }

  function names(token) {
    return JSON.parse(token.closest("[data-models]").dataset.models);
  }

  function fill(token) {
    const models = names(token);
    const data = token.dataset;
    panel.replaceChildren(element("div", "token", quoted(data.p ?? token.textContent)));
    let told = "written by " + models[Number(data.a || 0)];
    if (data.l) told += ", probability " + percent(Math.exp(Number(data.l))) + " (log " + Number(data.l).toFixed(3) + ")";
    panel.append(element("div", "what", told));
    if (data.b !== undefined && !data.o) panel.append(element("div", "what", models[0] + " would have written " + quoted(data.b)));
    if (token.classList.contains("back")) panel.append(element("div", "what", "deferred, but the assistant gave no answer"));
    if (data.f) panel.append(element("div", "what", data.f));
    if (data.c) {
      const tokens = data.k ? ": " + JSON.parse(data.k).map(quoted).join(" ") : "";
      panel.append(element("div", "what", "a chunk of " + data.c + " tokens of " + models[0] + tokens));
    }
    if (data.d) panel.append(element("div", "what", "drafted ahead, and " + data.d));
    if (data.o) panel.append(would(models, JSON.parse(data.o)));
    if (!data.g) return;
    const rows = element("div", "rows", "");
    data.g.split(" ").forEach((gate, model) => {
      const row = element("div", ("row " + author(model)).trim(), "");
      const bar = document.createElement("i");
      bar.style.width = 100 * Number(gate) + "%";
      row.append(element("span", "", models[model]), bar, element("b", "", percent(Number(gate))));
      rows.append(row);
    });
    panel.append(rows);
  }

  /** What each model would have written in the place of a token, and what it thinks of the token that stands there. */
  function would(models, found) {
    const list = element("div", "would", "");
    found.forEach((said, model) => {
      const name = models[model];
      if (!said) list.append(element("div", "what", name + " has nothing to say here"));
      else if (said.fault) list.append(element("div", "what", name + ": " + said.fault));
      else {
        const chance = percent(Math.exp(said.log_prob));
        const own = said.log_prob === said.given_log_prob ? "" : "; this one: " + percent(Math.exp(said.given_log_prob));
        list.append(element("div", "", name + " would write " + quoted(said.text) + " (" + chance + own + ")"));
      }
    });
    return list;
  }

  function place(token) {
    const box = token.getClientRects()[0];
    if (!box) return;
    const left = Math.max(8, Math.min(box.left, innerWidth - panel.offsetWidth - 8));
    const below = box.bottom + 8 + panel.offsetHeight < innerHeight;
    panel.style.left = left + "px";
    panel.style.top = (below ? box.bottom + 8 : Math.max(8, box.top - panel.offsetHeight - 8)) + "px";
  }

  /** Open the panel for a token, or close it (null). */
  function show(token) {
    if (token !== marked) {
      if (marked) marked.classList.remove("on");
      marked = token;
      if (token) {
        token.classList.add("on");
        fill(token);
      }
      panel.style.display = token ? "block" : "none";
    }
    if (token) place(token);
  }

  function under(event) {
    return event.target.closest ? event.target.closest(".written .t") : null;
  }

  function key(event) {
    if (event.key === "Escape") {
      pinned = false;
      show(null);
      return;
    }
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const text = event.target.closest ? event.target.closest(".written") : null;
    if (!step || !text) return;
    const tokens = [...text.querySelectorAll(".t")];
    const at = tokens.indexOf(marked);
    const next = tokens[at < 0 ? (step > 0 ? 0 : tokens.length - 1) : Math.max(0, Math.min(tokens.length - 1, at + step))];
    if (!next) return;
    event.preventDefault();
    pinned = true;
    next.scrollIntoView({ block: "nearest" });
    show(next);
  }

  function start() {
    panel = document.createElement("div");
    panel.id = "tip";
    panel.setAttribute("role", "status");
    document.body.append(panel);
    document.addEventListener("pointerover", (event) => {
      if (event.pointerType !== "touch" && !pinned) show(under(event));
    });
    document.addEventListener("click", (event) => {
      if (panel.contains(event.target)) return;
      const token = under(event);
      const again = pinned && token === marked;
      pinned = token !== null && !again;
      show(pinned ? token : null);
    });
    document.addEventListener("keydown", key);
    addEventListener("scroll", () => (pinned ? marked && place(marked) : show(null)), { passive: true });
    adopt(document);
  }

  /** Let the keyboard reach the texts under an element; called again for texts that come later. */
  function adopt(root) {
    for (const text of root.querySelectorAll(".written")) text.tabIndex = 0;
  }

  /** A span `.t` of the fields of a token, as the program writes them: piece, author, log_prob, gate, base_piece, changed,
      abstained, draft, fault, token_pieces (of a chunk). */
  function make(fields) {
    const token = element("span", ["t", author(fields.author || 0)].filter(Boolean).join(" "), fields.piece);
    token.classList.toggle("changed", Boolean(fields.changed));
    token.classList.toggle("back", Boolean(fields.abstained));
    if (fields.author) token.dataset.a = fields.author;
    if (Number.isFinite(fields.log_prob)) token.dataset.l = fields.log_prob;
    if (fields.gate && fields.gate.length) {
      token.dataset.g = fields.gate.join(" ");
      token.style.setProperty("--g", 1 - fields.gate[0]);
    }
    if (fields.token_pieces && fields.token_pieces.length > 1) {
      token.dataset.c = fields.token_pieces.length;
      token.dataset.k = JSON.stringify(fields.token_pieces);
    }
    if (fields.draft) token.dataset.d = fields.draft;
    if (fields.fault) token.dataset.f = fields.fault;
    if (fields.changed && fields.base_piece != null) token.dataset.b = fields.base_piece;
    if (fields.author && fields.piece.includes("\n")) {
      token.dataset.p = fields.piece;
      token.replaceChildren();
      fields.piece.split("\n").forEach((line, number) => {
        if (number) token.append(element("span", "nl", "\u21b5"), "\n");
        token.append(line);
      });
    }
    return token;
  }

  /** Let the panel of a token say what each model would have written: text, log_prob, given_log_prob; null; or a fault. */
  function tell(token, found) {
    token.dataset.o = JSON.stringify(found);
    if (token === marked) fill(token);
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
  return { adopt, make, tell, show, author, percent };
})();
