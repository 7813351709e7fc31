// One task as elements: its context, the true continuation, and its completions.
//
// A task: {id, c: context, t: truth tokens, e: entropy in nats or null, r: completions}.
// A completion: {o: 0 right, 1 wrong, 2 truncated; p: prediction or null; w: reward; v: policy version; and either
//   k: tokens, l: -100 x log-probs in nats or null, n: number of tokens in the thought, or (in files of earlier versions) h: thought, a: answer}.

const OUTCOMES = ["right", "wrong", "truncated"];
const MAX_COMPLETIONS = 16; // shown at once for one task; the next line is the limit for one completion
const MAX_TOKENS = 400;

/** Make white space visible, because every space in a prediction counts. */
function visible(text) {
  return text.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

/** Return one of five classes of a token's probability, from likely (1) to surprising (5). */
function probabilityClass(centinats) {
  const probability = Math.exp(-centinats / 100);
  return [0.9, 0.5, 0.2, 0.05].findIndex((limit) => probability >= limit) + 1 || 5;
}

function percent(centinats) {
  const value = 100 * Math.exp(-centinats / 100);
  return `${value >= 10 ? value.toFixed(0) : value.toPrecision(2)} %`;
}

function taskView(task, completions) {
  const view = document.createDocumentFragment();
  const context = element("div", "context");
  context.append(element("span", "context-text", task.c));
  for (const [index, token] of task.t.entries()) {
    const span = element("span", index ? "truth later" : "truth", visible(token) || "…");
    span.title = token ? `true token ${index + 1}` : `true token ${index + 1} ends inside a character`;
    context.append(span);
  }
  const heading = element("h3", "", task.id);
  const entropy = task.e === null ? "" : `, proxy entropy ${task.e.toFixed(2)} nats`;
  view.append(heading, element("p", "hint", `Context, then the true continuation by token${entropy}. · is a space, ⏎ a line break.`), context);
  view.append(moreOf(completions, MAX_COMPLETIONS, completionView, "completions"));
  return view;
}

function completionView(completion) {
  const outcome = OUTCOMES[completion.o];
  const card = element("section", `completion ${outcome}`);
  const head = element("p", "completion-head");
  head.append(element("span", `mark ${outcome}`, `${["✓", "✗", "✂"][completion.o]} ${outcome}`));
  const prediction = completion.p === null ? element("em", "", "no box") : element("code", "", visible(completion.p) || "(empty)");
  head.append("prediction ", prediction);
  const count = completion.k ? `${completion.k.length} tokens, ` : "";
  head.append(element("span", "meta", `reward ${completion.w}, ${count}policy version ${completion.v}`));
  card.append(head);
  const body = element("div", "said");
  if (completion.k) {
    body.append(moreOf(completion.k.map((_, index) => index), MAX_TOKENS, (index) => tokenView(completion, index), "tokens"));
  } else {
    body.append(element("span", "", completion.h), element("span", "answer", completion.a));
  }
  card.append(body);
  if (completion.l) card.append(element("p", "readout", meanProbability(completion)));
  return card;
}

function meanProbability(completion) {
  const mean = completion.l.reduce((sum, value) => sum + value, 0) / Math.max(1, completion.l.length);
  return `Point at a token for its probability. Geometric mean: ${percent(mean)}.`;
}

function tokenView(completion, index) {
  const text = completion.k[index];
  const span = element("span", index >= completion.n ? "tok answer" : "tok", text.replaceAll("\n", "⏎\n") || "…");
  if (completion.l) {
    span.classList.add(`p${probabilityClass(completion.l[index]) - 1}`);
    span.dataset.readout = `${visible(text) || "(part of a character)"}: ${percent(completion.l[index])}, token ${index + 1} of ${completion.k.length}`;
  }
  return span;
}

/** Show the first items and a button for the others, so that the page never holds more than the reader asked for. */
function moreOf(items, number, show, noun) {
  const made = document.createDocumentFragment();
  made.append(...items.slice(0, number).map(show));
  if (items.length > number) {
    const button = element("button", "more", `Show ${(items.length - number).toLocaleString("en")} more ${noun}`);
    button.type = "button";
    button.addEventListener("click", () => button.replaceWith(moreOf(items.slice(number), 5 * number, show, noun)));
    made.append(button);
  }
  return made;
}
