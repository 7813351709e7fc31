// The rollout browser: select run, step, outcome and task with the pointer or the keyboard. The list holds only the rows in view.

(() => {
  if (!document.getElementById("browser")) return;
  const ROW = 58; // CSS pixels; style.css sets the same height
  const FILTERS = { all: null, right: 0, wrong: 1, truncated: 2 };
  const index = embeddedJson("index");
  const at = (id) => document.getElementById(id);
  const browser = at("browser"), list = at("list"), rows = at("rows"), article = at("task"), status = at("status");
  const runSelect = at("run"), stepSelect = at("step"), find = at("find");
  const state = { block: null, tasks: [], shown: [], chosen: 0, filter: "all", loading: 0 };
  const tasksOf = new Map(); // the block unpacked last, keyed by its id

  function fill(select, entries) {
    select.replaceChildren(...entries.map(([value, text]) => Object.assign(element("option", "", text), { value })));
  }

  const blocks = () => index.blocks.filter((block) => block.run === Number(runSelect.value));

  function fillSteps() {
    fill(stepSelect, blocks().map((block) => [block.step, `${block.step} (${block.num_rollouts.toLocaleString("en")} rollouts)`]));
    return loadStep();
  }

  async function loadStep() {
    const block = blocks().find((candidate) => candidate.step === Number(stepSelect.value));
    const id = `rollouts-${block.run}-${block.step}`;
    const turn = ++state.loading;
    if (!tasksOf.has(id)) {
      status.textContent = "Unpacking…";
      const { tasks } = JSON.parse(await inflate(id));
      if (turn !== state.loading) return; // another step was selected meanwhile
      tasksOf.clear();
      tasksOf.set(id, tasks);
    }
    state.block = block;
    state.tasks = tasksOf.get(id);
    state.chosen = 0;
    applyFilter();
  }

  const texts = (task) => [task.id, task.c, task.t.join(""), ...task.r.map((completion) => completion.k?.join("") ?? completion.h + completion.a)];

  function applyFilter() {
    const outcome = FILTERS[state.filter];
    const wanted = find.value.toLowerCase();
    const before = state.shown[state.chosen]?.task;
    const counts = { all: 0, right: 0, wrong: 0, truncated: 0 };
    state.shown = [];
    for (const task of state.tasks) {
      for (const completion of task.r) counts[OUTCOMES[completion.o]] += 1;
      counts.all += task.r.length;
      const completions = outcome === null ? task.r : task.r.filter((completion) => completion.o === outcome);
      if (!completions.length || (wanted && !texts(task).some((text) => text.toLowerCase().includes(wanted)))) continue;
      state.shown.push({ task, completions });
    }
    for (const output of browser.querySelectorAll("[data-count]")) output.textContent = counts[output.dataset.count].toLocaleString("en");
    const number = state.shown.reduce((sum, entry) => sum + entry.completions.length, 0);
    const old = state.block.has_tokens ? "" : " Recorded by an earlier version, without tokens and their probabilities.";
    status.textContent = `${number.toLocaleString("en")} completions of ${state.shown.length.toLocaleString("en")} tasks.${old}`;
    choose(Math.max(0, state.shown.findIndex((entry) => entry.task === before)));
  }

  function choose(position) {
    state.chosen = Math.max(0, Math.min(position, state.shown.length - 1));
    const top = state.chosen * ROW;
    rows.style.height = `${state.shown.length * ROW}px`;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
    drawRows();
    drawTask();
  }

  function drawRows() {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 3);
    const last = Math.min(state.shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 3);
    const drawn = [];
    for (let position = first; position < last; position++) drawn.push(rowView(position));
    rows.replaceChildren(...drawn);
    const isDrawn = state.chosen >= first && state.chosen < last;
    isDrawn ? list.setAttribute("aria-activedescendant", `row-${state.chosen}`) : list.removeAttribute("aria-activedescendant");
  }

  function rowView(position) {
    const { task } = state.shown[position];
    const row = element("div", "row");
    row.id = `row-${position}`;
    row.style.top = `${position * ROW}px`;
    row.dataset.position = position;
    row.setAttribute("role", "option");
    row.setAttribute("aria-selected", position === state.chosen);
    row.setAttribute("aria-posinset", position + 1);
    row.setAttribute("aria-setsize", state.shown.length);
    const text = element("span", "row-text");
    const context = element("span", "row-context");
    context.append(element("span", "", task.c.slice(-60).replace(/\s+/g, " ")));
    text.append(context, element("b", "", visible(task.t[0] || "…")));
    const right = task.r.filter((completion) => completion.o === 0).length;
    const marks = element("span", "row-marks");
    marks.append(element("span", "bar"), `${right} of ${task.r.length} right`);
    marks.firstChild.style.setProperty("--share", `${(100 * right) / task.r.length}%`);
    row.append(text, marks);
    return row;
  }

  function drawTask() {
    const entry = state.shown[state.chosen];
    const hadFocus = article.contains(document.activeElement);
    article.replaceChildren(...(entry ? [turnView(), taskView(entry.task, entry.completions)] : [element("p", "empty", "No completion passes the filter.")]));
    article.scrollTop = 0;
    if (hadFocus) article.focus({ preventScroll: true }); // otherwise the focus, and the keys with it, are lost with the element that is gone
  }

  function turnView() {
    const turn = element("div", "turn");
    const place = `task ${(state.chosen + 1).toLocaleString("en")} of ${state.shown.length.toLocaleString("en")}`;
    turn.append(turnButton("‹ Previous", -1, "previous"), element("span", "", place), turnButton("Next ›", 1, "next"));
    return turn;
  }

  function turnButton(text, move, name) {
    const button = element("button", name, text);
    button.type = "button";
    button.disabled = !state.shown[state.chosen + move];
    button.addEventListener("click", () => {
      choose(state.chosen + move);
      article.querySelector(`.${name}:enabled`)?.focus({ preventScroll: true });
    });
    return button;
  }

  function setFilter(name) {
    state.filter = name;
    browser.querySelector(`input[name=filter][value=${name}]`).checked = true;
    applyFilter();
  }

  function moveStep(move) {
    const next = stepSelect.selectedIndex + move;
    if (next < 0 || next >= stepSelect.length) return;
    stepSelect.selectedIndex = next;
    loadStep();
  }

  const page = () => Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
  const inList = { Home: () => choose(0), End: () => choose(state.shown.length - 1), PageDown: () => choose(state.chosen + page()), PageUp: () => choose(state.chosen - page()),
    ArrowDown: () => choose(state.chosen + 1), ArrowUp: () => choose(state.chosen - 1), Enter: () => article.focus() };
  const anywhere = { j: () => choose(state.chosen + 1), k: () => choose(state.chosen - 1), "[": () => moveStep(-1), "]": () => moveStep(1), "/": () => find.focus(),
    a: () => setFilter("all"), r: () => setFilter("right"), w: () => setFilter("wrong"), t: () => setFilter("truncated"), Escape: () => list.focus() };

  browser.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const isTyping = event.target === find || event.target.tagName === "SELECT";
    if (isTyping && event.key !== "Escape") return;
    const action = (event.target === list && inList[event.key]) || anywhere[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });

  let typing;
  find.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(applyFilter, 150);
  });
  for (const radio of browser.querySelectorAll("input[name=filter]")) radio.addEventListener("change", () => setFilter(radio.value));
  list.addEventListener("scroll", drawRows);
  list.addEventListener("click", (event) => {
    const row = event.target.closest(".row");
    if (row) choose(Number(row.dataset.position));
  });
  article.addEventListener("pointerover", (event) => {
    const { readout } = event.target.dataset;
    if (readout) event.target.closest(".completion").querySelector(".readout").textContent = readout;
  });
  at("tint").addEventListener("change", (event) => browser.classList.toggle("untinted", !event.target.checked));
  new ResizeObserver(drawRows).observe(list);
  runSelect.addEventListener("change", fillSteps);
  stepSelect.addEventListener("change", loadStep);
  fill(runSelect, index.runs.map((name, run) => [run, name]).filter(([run]) => index.blocks.some((block) => block.run === run)));
  fillSteps();
})();
