// The explorer: filters, neighbours before and after, and the match of one pair. No libraries.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const STEP = 30; // queries drawn at once
  const EQUAL = 0.05; // percent points: smaller changes are no change
  const SIDE = 100, GAP = 14; // the stage's units: width of an image, space between the two
  const find = (id) => document.getElementById(id);
  const svgName = "http://www.w3.org/2000/svg";

  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const draw = (tag, attributes) => {
    const element = document.createElementNS(svgName, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const picture = (index) => {
    const [jpeg, label, name, width, height, layout] = data.pictures[index];
    return { src: `data:image/jpeg;base64,${jpeg}`, label, name, width, height,
      title: data.classes[label], boxes: layout < 0 ? null : data.layouts[layout] };
  };
  const changeOf = ([before, after]) =>
    after - before > EQUAL ? "improved" : before - after > EQUAL ? "worsened" : "unchanged";

  // ---- the list of queries -------------------------------------------------------------------
  const queries = data.queries.map(([index, scores, neighbours, similarities], number) => ({
    number, index, scores, neighbours, similarities,
    label: data.pictures[index][1], change: changeOf(scores),
  }));
  const state = { change: "all", label: "", shown: [], drawn: 0 };
  const list = find("queries"), chooser = find("class");

  const labels = [...new Set(queries.map((query) => query.label))];
  labels.sort((a, b) => data.classes[a].localeCompare(data.classes[b]));
  for (const label of labels) chooser.append(make("option", { value: label }, data.classes[label]));

  const neighbourItem = (query, method, place) => {
    const index = query.neighbours[method][place];
    const other = picture(index), similarity = query.similarities[method][place];
    const right = other.label === query.label;
    const text = similarity === null ? "not compared" : similarity.toFixed(3);
    const opens = `${query.index} ${index}` in data.matches;
    const image = make("img", { src: other.src, alt: "", loading: "lazy", decoding: "async" });
    const mark = make("b", { "aria-hidden": "true" }, right ? "✓" : "✗");
    const button = make("button", {
      type: "button", class: `neighbour ${right ? "right" : "wrong"}${opens ? "" : " plain"}`,
      "data-query": query.number, "data-method": method, "data-place": place,
      "aria-label": `${data.methods[method]}, neighbour ${place + 1}: ${other.title}, ` +
        `${right ? "right" : "wrong"}, similarity ${text}`,
      title: other.name,
    }, image, mark);
    if (!opens) button.setAttribute("aria-disabled", "true");
    const caption = make("small", {}, text);
    if (!right) caption.append(make("br"), other.title);
    return make("li", {}, button, caption);
  };

  const card = (query) => {
    const own = picture(query.index);
    const [before, after] = query.scores;
    const self = make("div", { class: "self" },
      make("img", { src: own.src, alt: `query ${own.name}`, loading: "lazy", decoding: "async" }),
      make("strong", {}, own.title),
      make("span", { class: `quiet change-${query.change}` },
        `${data.metric} ${before.toFixed(0)} → ${after.toFixed(0)}, ${query.change}`));
    const rows = make("div", { class: "rows" });
    data.methods.forEach((name, method) => {
      const row = make("ol", { class: "row", "aria-label": `${name}: neighbours` });
      query.neighbours[method].forEach((_, place) => row.append(neighbourItem(query, method, place)));
      rows.append(make("p", { class: "row-name" }, name), row);
    });
    const article = make("article", { class: "query", "aria-label": `Query: ${own.title}` });
    article.append(self, rows);
    return article;
  };

  const drawMore = () => {
    const part = state.shown.slice(state.drawn, state.drawn + STEP);
    list.append(...part.map(card));
    state.drawn += part.length;
    const left = state.shown.length - state.drawn;
    find("more").hidden = left === 0;
    find("more").textContent = `Show ${Math.min(STEP, left)} more of ${left}`;
  };
  const update = () => {
    const ofClass = queries.filter((query) => state.label === "" || query.label === +state.label);
    state.shown = ofClass.filter((query) => state.change === "all" || query.change === state.change);
    state.drawn = 0;
    list.replaceChildren();
    for (const button of document.querySelectorAll("[data-change]")) {
      const change = button.dataset.change;
      const count = ofClass.filter((query) => change === "all" || query.change === change).length;
      button.textContent = `${change[0].toUpperCase()}${change.slice(1)} (${count})`;
      button.setAttribute("aria-pressed", String(change === state.change));
    }
    const count = state.shown.length;
    find("count").textContent = count ? `${count} ${count === 1 ? "query" : "queries"}` :
      "No query is like that; choose another change or class.";
    drawMore();
  };

  find("filters").addEventListener("submit", (event) => event.preventDefault());
  find("filters").addEventListener("click", (event) => {
    const button = event.target.closest("[data-change]");
    if (button) { state.change = button.dataset.change; update(); }
  });
  chooser.addEventListener("change", () => { state.label = chooser.value; update(); });
  for (const button of document.querySelectorAll("[data-class]")) {
    button.addEventListener("click", () => {
      const known = labels.includes(+button.dataset.class);
      state.label = chooser.value = known ? button.dataset.class : "";
      state.change = "all";
      update();
      find("explorer").scrollIntoView();
    });
  }
  find("more").addEventListener("click", () => {
    const first = state.drawn;
    drawMore();
    list.children[first]?.querySelector(".neighbour")?.focus();
  });
  list.addEventListener("click", (event) => {
    const button = event.target.closest(".neighbour");
    if (button) open(button);
  });
  list.addEventListener("keydown", (event) => {
    const button = event.target.closest(".neighbour");
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!button || !step) return;
    event.preventDefault();
    const rows = [...list.querySelectorAll(".row")];
    const row = rows[rows.indexOf(button.closest(".row")) + step[0]];
    const place = +button.dataset.place + step[1];
    const next = row?.querySelectorAll(".neighbour")[place];
    if (next) { next.focus(); next.scrollIntoView({ block: "nearest" }); }
  });

  // ---- one match -----------------------------------------------------------------------------
  const dialog = find("match"), stage = find("stage");
  let match = null; // what the dialog shows

  // How bright each place is: the weight of the nodes over it, per area, as a mask of darkness.
  const darkness = (boxes, weights) => {
    const side = 72, light = new Float64Array(side * side);
    boxes.forEach(([x0, y0, x1, y1], node) => {
      const density = weights[node] / Math.max(1e-9, (x1 - x0) * (y1 - y0));
      const [left, top, right, bottom] = [x0, y0, x1, y1].map((v) => Math.round(v * side));
      for (let y = Math.max(0, top); y < Math.min(side, bottom); y++)
        for (let x = Math.max(0, left); x < Math.min(side, right); x++) light[y * side + x] += density;
    });
    const most = light.reduce((a, b) => Math.max(a, b), 1e-9);
    const canvas = make("canvas", { width: side, height: side });
    const context = canvas.getContext("2d"), pixels = context.createImageData(side, side);
    light.forEach((value, i) => { pixels.data[4 * i + 3] = 255 * 0.65 * (1 - value / most); });
    context.putImageData(pixels, 0, 0);
    return canvas.toDataURL();
  };
  const area = ([x0, y0, x1, y1]) => (x1 - x0) * (y1 - y0);
  const isWhole = (box) => area(box) > 0.99;

  // Nodes of about one size form a level; random patches, all of different sizes, are one level.
  const levelsOf = (boxes) => {
    const sizes = [...new Set(boxes.map((box) => Math.round(area(box) * 50)))].sort((a, b) => a - b);
    if (sizes.length > 5) return [boxes.map((_, i) => i)];
    return sizes.map((size) => boxes.flatMap((box, i) => Math.round(area(box) * 50) === size ? [i] : []));
  };
  // Where a part lies; beside others of a larger size, also of how many it is one.
  const nameOf = (side, node) => {
    const box = match.sides[side].boxes[node], levels = match.levels[side];
    if (isWhole(box)) return "the whole image";
    const level = levels.find((nodes) => nodes.includes(node));
    const among = levels.length > 1 ? ` of ${level.length}` : "";
    const x = (box[0] + box[2]) / 2, y = (box[1] + box[3]) / 2;
    const across = x < 0.4 ? "left" : x > 0.6 ? "right" : "", up = y < 0.4 ? "top" : y > 0.6 ? "bottom" : "";
    return ([up, across].filter(Boolean).join(" ") || "centre") + among;
  };
  const percent = (share) => `${share < 0.0995 ? (100 * share).toFixed(1) : (100 * share).toFixed(0)} %`;

  function open(button) {
    const query = queries[+button.dataset.query], method = +button.dataset.method;
    const index = query.neighbours[method][+button.dataset.place];
    const found = data.matches[`${query.index} ${index}`];
    if (!found) return;
    const [similarity, own, others, flows] = found;
    const sides = [picture(query.index), picture(index)];
    match = { flows, sides, weights: [own, others], opener: button,
      levels: sides.map((side) => levelsOf(side.boxes)), level: 0 };
    find("match-title").textContent = `${sides[0].title} → ${sides[1].title}`;
    const right = sides[0].label === sides[1].label;
    find("match-facts").textContent = `${right ? "✓ same class" : "✗ other class"} · similarity by EMD ` +
      `${similarity.toFixed(3)} · query left, neighbour ${+button.dataset.place + 1} by ${data.methods[method]} right`;
    drawStage();
    drawSizes();
    dialog.showModal();
    dialog.scrollTop = 0;
    // The part that counts most is what people want to see first.
    const start = match.levels[0][0].reduce((a, b) => (own[b] > own[a] ? b : a));
    point(0, start);
    match.nodes[0][start].focus({ preventScroll: true });
  }

  function drawStage() {
    const heights = match.sides.map((side) => SIDE * side.height / side.width);
    const svg = draw("svg", { viewBox: `-1.5 -1.5 ${2 * SIDE + GAP + 3} ${Math.max(...heights) + 3}`,
      role: "group", "aria-label": "Query left, neighbour right" });
    match.svg = svg;
    match.nodes = [[], []];
    match.place = (side, [x0, y0, x1, y1]) => ({
      x: side * (SIDE + GAP) + x0 * SIDE, y: y0 * heights[side],
      width: (x1 - x0) * SIDE, height: (y1 - y0) * heights[side],
    });
    match.sides.forEach((image, side) => {
      const frame = { ...match.place(side, [0, 0, 1, 1]), preserveAspectRatio: "none" };
      svg.append(draw("image", { ...frame, href: image.src }));
      svg.append(draw("image", { ...frame, href: darkness(image.boxes, match.weights[side]), class: "dim" }));
      // Small parts lie on top, so that pointing finds them.
      const order = image.boxes.map((_, i) => i).sort((a, b) => area(image.boxes[b]) - area(image.boxes[a]));
      for (const node of order) {
        const box = image.boxes[node];
        const rect = draw("rect", { ...match.place(side, box), class: "node", tabindex: -1, role: "button",
          "data-side": side, "data-node": node,
          "aria-label": `${side ? "neighbour" : "query"}, ${nameOf(side, node)}, ` +
            `weight ${percent(match.weights[side][node])}` });
        match.nodes[side][node] = rect;
        svg.append(rect);
      }
    });
    match.marks = draw("g", {});
    svg.append(match.marks);
    stage.replaceChildren(svg);
    applyLevel();
  }

  function drawSizes() {
    const levels = match.levels[0];
    const words = levels.map((nodes) => {
      const box = match.sides[0].boxes[nodes[0]];
      return isWhole(box) && nodes.length === 1 ? "Whole image" : `${nodes.length} parts`;
    });
    find("sizes").replaceChildren(...(levels.length < 2 ? [] : words.map((word, level) =>
      make("button", { type: "button", "data-level": level, "aria-pressed": String(level === match.level) }, word))));
  }
  function applyLevel() {
    match.sides.forEach((_, side) => {
      const shown = new Set(match.levels[side][Math.min(match.level, match.levels[side].length - 1)]);
      match.nodes[side].forEach((rect, node) => {
        rect.style.pointerEvents = shown.has(node) ? "all" : "none";
        rect.style.visibility = shown.has(node) ? "visible" : "hidden";
      });
    });
  }

  function point(side, node) {
    if (match.on && match.on[0] === side && match.on[1] === node) return;
    match.on = [side, node];
    const other = 1 - side, box = match.sides[side].boxes[node], weight = match.weights[side][node];
    const targets = match.flows.filter((flow) => flow[side] === node && flow[2] > 0)
      .map((flow) => ({ node: flow[other], mass: flow[2], cost: flow[3] })).sort((a, b) => b.mass - a.mass);
    const total = targets.reduce((sum, target) => sum + target.mass, 0) || 1;
    applyLevel();
    for (const rect of match.nodes.flat()) { rect.classList.remove("on", "to"); rect.setAttribute("tabindex", -1); }
    const own = match.nodes[side][node];
    own.classList.add("on");
    own.setAttribute("tabindex", 0);
    own.style.visibility = "visible";
    match.marks.replaceChildren();
    // From near edge to near edge, so that the parts themselves stay visible.
    const near = (which, place) => [which ? place.x : place.x + place.width, place.y + place.height / 2];
    const [x, y] = near(side, match.place(side, box));
    const badges = [];
    targets.slice(0, 6).forEach((target, rank) => {
      const rect = match.nodes[other][target.node];
      rect.classList.add("to");
      rect.style.visibility = "visible";
      const [tx, ty] = near(other, match.place(other, match.sides[other].boxes[target.node]));
      const line = { x1: x, y1: y, x2: tx, y2: ty }, width = 0.4 + 1.4 * target.mass / total;
      match.marks.append(draw("line", { ...line, class: "edge", "stroke-width": width + 0.7 }),
        draw("line", { ...line, class: "line", "stroke-width": width }));
      const text = draw("text", { x: tx, y: ty, class: "badge-text" });
      text.textContent = rank + 1;
      badges.push(draw("circle", { cx: tx, cy: ty, r: 3, class: "badge" }), text);
    });
    match.marks.append(...badges);
    find("part").textContent = `${side ? "Neighbour" : "Query"}, ${nameOf(side, node)}: ${percent(weight)} of the weight`;
    const verb = side ? "from" : "to";
    const items = targets.slice(0, 6).map((target) => make("li", {},
      `${percent(target.mass / total)} ${verb} ${nameOf(other, target.node)}, cost ${target.cost.toFixed(3)}`));
    if (!items.length) items.push(make("li", {}, "no mass moves here"));
    find("flows").replaceChildren(...items);
  }

  const nodeOf = (event) => {
    const rect = event.target.closest?.(".node");
    return rect && [+rect.dataset.side, +rect.dataset.node];
  };
  // Not pointerover: it fires under a pointer at rest when the dialog opens.
  for (const kind of ["pointermove", "click", "focusin"]) {
    stage.addEventListener(kind, (event) => { const node = nodeOf(event); if (node) point(...node); });
  }
  stage.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step || !match.on) return;
    event.preventDefault();
    // The nearest part in that direction, of either image; what lies aside counts double.
    const centre = (side, node) => {
      const place = match.place(side, match.sides[side].boxes[node]);
      return [place.x + place.width / 2, place.y + place.height / 2];
    };
    const from = centre(...match.on);
    let best = null, least = Infinity;
    match.levels.forEach((levels, side) => {
      for (const node of levels[Math.min(match.level, levels.length - 1)]) {
        const to = centre(side, node), dx = to[0] - from[0], dy = to[1] - from[1];
        const along = dx * step[0] + dy * step[1], aside = Math.abs(dx * step[1]) + Math.abs(dy * step[0]);
        const far = along + 2 * aside;
        if (along > 0.5 && aside <= 2 * along && far < least) { least = far; best = [side, node]; }
      }
    });
    if (best) { match.nodes[best[0]][best[1]].focus({ preventScroll: true }); point(...best); }
  });
  find("sizes").addEventListener("click", (event) => {
    const button = event.target.closest("[data-level]");
    if (!button) return;
    match.level = +button.dataset.level;
    match.on = null;
    applyLevel();
    for (const other of find("sizes").children) other.setAttribute("aria-pressed", String(other === button));
    const own = match.weights[0];
    point(0, match.levels[0][match.level].reduce((a, b) => (own[b] > own[a] ? b : a)));
  });
  find("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => {
    stage.replaceChildren();
    match?.opener.focus();
    match = null;
  });

  update();
})();
