// An answer, to be taken elsewhere: as text, JSON, HTML, and as the command that asks for it again.

const escaped = (text) =>
  text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");

const LINES = ["solid", "dashed", "dotted", "double"];

function html(answer) {
  const tokens = answer.tokens.map((token) => {
    const z = answer.names.indexOf(token.author);
    const style = z > 0 ? ` style="border-bottom:2px ${LINES[(z - 1) % 4]};background:#8884"` : "";
    return `<span title="${escaped(token.author)}"${style}>${escaped(token.text)}</span>`;
  });
  return `<pre style="white-space:pre-wrap">${tokens.join("")}</pre>`;
}

function curl(answer) {
  // For a POSIX shell: nothing in single quotes means anything but the quote itself.
  const body = JSON.stringify({ ...answer.body, stream: false }).replaceAll("'", "'\\''");
  const key = answer.headers.Authorization ? ' -H "Authorization: Bearer $COLLM_API_KEY"' : "";
  return `curl ${location.origin}/v1/chat/completions -H 'Content-Type: application/json'${key} -d '${body}'`;
}

export const FORMS = {
  text: (answer) => answer.content,
  JSON: (answer) => JSON.stringify(
    { request: answer.body, content: answer.content, tokens: answer.tokens, others: answer.others ?? undefined }, null, 2),
  HTML: html,
  curl,
};

/** Into the clipboard. On pages that come without TLS from elsewhere, browsers know only the old way. */
export async function copy(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const before = document.activeElement;
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  before?.focus();
  if (!done) throw new Error("refused");
}
