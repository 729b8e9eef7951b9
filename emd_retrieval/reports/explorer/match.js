// One match in a dialog: node weights as light, flows of a part, all flows, the image rebuilt.
"use strict";
const matchView = (data, { make, picture, find }) => {
  const SIDE = 100, GAP = 14; // the stage's units: width of an image, space between the two
  const SHOWN = 6; // flows of one part that are listed
  const HINTS = {
    parts: "Light is node weight: dark parts count for little. Point at a part, tap it, or move with the arrows, " +
      "to see where its mass flows; the share is of that part's mass, the cost 0 for equal features and 1 for unrelated ones.",
    flows: "All that moves between the two images (Figure 7 of the paper); pointing at a part picks out its own flows.",
    rebuilt: "In the place of each part of the query stands the part of the neighbour that most of its mass " +
      "flows to (Figure 6 of the paper). Light is the query's node weight.",
  };
  // Viridis: one direction of lightness, so that costs are told apart without colour.
  const COSTS = [[68, 1, 84], [49, 104, 142], [53, 183, 121], [253, 231, 37]];
  const dialog = find("match"), stage = find("stage");
  let match = null; // what the dialog shows
  let view = "parts"; // stays from match to match

  const draw = (tag, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  // Weights of both sides, then query node, reference node, mass, cost of each flow; as 16-bit numbers.
  const unpack = ([similarity, own, others, text]) => {
    const words = new Uint16Array(Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer);
    const share = (word) => word / 65535, [low, high] = data.costs;
    const flows = [];
    for (let i = own + others; i < words.length; i += 4)
      flows.push([words[i], words[i + 1], share(words[i + 2]), low + share(words[i + 3]) * (high - low)]);
    return { similarity, flows,
      weights: [Array.from(words.subarray(0, own), share), Array.from(words.subarray(own, own + others), share)] };
  };

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
  // A level is a grid of nodes, row by row; random patches, which are none, are one level.
  const levelsOf = (boxes) => {
    const middles = boxes.map(([, y0, , y1]) => (y0 + y1) / 2), levels = [];
    middles.forEach((y, node) => {
      // Where rows begin at the top again, a level begins.
      if (!node || y < middles[node - 1] - 1e-4) levels.push([]);
      levels.at(-1).push(node);
    });
    const isGrid = (nodes) => {
      const rows = new Map();
      for (const node of nodes) rows.set(middles[node].toFixed(3), (rows.get(middles[node].toFixed(3)) ?? 0) + 1);
      return new Set(rows.values()).size === 1;
    };
    if (!levels.every(isGrid) || levels.filter((nodes) => nodes.length === 1).length > 1) return [boxes.map((_, i) => i)];
    const size = (nodes) => nodes.reduce((sum, node) => sum + area(boxes[node]), 0) / nodes.length;
    return levels.sort((a, b) => size(a) - size(b));
  };
  const levelOf = (side) => match.levels[side][Math.min(match.level, match.levels[side].length - 1)];
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
  const heaviest = (nodes) => nodes.reduce((a, b) => (match.weights[0][b] > match.weights[0][a] ? b : a));
  const colorOf = (cost) => {
    const [low, high] = match.range;
    const place = (COSTS.length - 1) * Math.min(1, Math.max(0, (cost - low) / Math.max(1e-9, high - low)));
    const from = Math.min(COSTS.length - 2, Math.floor(place));
    const mixed = COSTS[from].map((value, i) => Math.round(value + (place - from) * (COSTS[from + 1][i] - value)));
    return `rgb(${mixed})`;
  };

  function frame(side, image, weights, svg, href = image.src) {
    const place = { ...match.place(side, [0, 0, 1, 1]), preserveAspectRatio: "none" };
    if (href) svg.append(draw("image", { ...place, href }));
    else svg.append(draw("rect", { ...match.place(side, [0, 0, 1, 1]), fill: "#888" }));
    return () => svg.append(draw("image", { ...place, href: darkness(image.boxes, weights), class: "dim" }));
  }

  function drawStage() {
    const heights = match.sides.map((side) => SIDE * side.height / side.width);
    // On a phone the images lie below each other: beside each other their parts are too small for a finger.
    match.tall = window.innerWidth < 640;
    const [across, down] = match.tall ? [0, heights[0] + GAP] : [SIDE + GAP, 0];
    match.place = (side, [x0, y0, x1, y1]) => ({
      x: side * across + x0 * SIDE, y: side * down + y0 * heights[side],
      width: (x1 - x0) * SIDE, height: (y1 - y0) * heights[side],
    });
    const size = [across + SIDE, match.tall ? down + heights[1] : Math.max(...heights)];
    const svg = draw("svg", { viewBox: `-1.5 -1.5 ${size[0] + 3} ${size[1] + 3}`, role: "group",
      "aria-label": `Query ${match.tall ? "above, neighbour below" : "left, neighbour right"}` });
    match.nodes = [[], []];
    match.all = draw("g", { class: "all" });
    match.marks = draw("g", {});
    if (view === "rebuilt") drawRebuilt(svg);
    else match.sides.forEach((image, side) => {
      frame(side, image, match.weights[side], svg)();
      // Small parts lie on top, so that pointing finds them.
      const order = image.boxes.map((_, i) => i).sort((a, b) => area(image.boxes[b]) - area(image.boxes[a]));
      for (const node of order) {
        const rect = draw("rect", { ...match.place(side, image.boxes[node]), class: "node", tabindex: -1, role: "button",
          "data-side": side, "data-node": node,
          "aria-label": `${side ? "neighbour" : "query"}, ${nameOf(side, node)}, ` +
            `weight ${percent(match.weights[side][node])}` });
        match.nodes[side][node] = rect;
        svg.append(rect);
      }
    });
    svg.append(match.all, match.marks);
    stage.replaceChildren(svg);
  }

  function drawRebuilt(svg) {
    const [own, other] = match.sides, parts = (boxes) => (boxes.every(isWhole) ? () => true : (node) => !isWhole(boxes[node]));
    const usable = [parts(own.boxes), parts(other.boxes)];
    frame(0, own, match.weights[0], svg)();
    // The right place takes the query's shape.
    const heights = SIDE * own.height / own.width;
    const place = match.place;
    match.place = (side, box) => side ? { ...place(0, box), x: place(0, box).x + (match.tall ? 0 : SIDE + GAP),
      y: place(0, box).y + (match.tall ? heights + GAP : 0) } : place(0, box);
    const box = svg.viewBox.baseVal;
    svg.setAttribute("viewBox", `${box.x} ${box.y} ${box.width} ${(match.tall ? 2 * heights + GAP : heights) + 3}`);
    svg.setAttribute("aria-label", "The query, and the query rebuilt from parts of the neighbour");
    svg.append(draw("rect", { ...match.place(1, [0, 0, 1, 1]), fill: "#000" }));
    const best = new Map();
    for (const [i, j, mass] of match.flows)
      if (usable[0](i) && usable[1](j) && mass > (best.get(i)?.mass ?? 0)) best.set(i, { part: j, mass });
    // Small parts are laid over large ones.
    const order = [...best.keys()].sort((a, b) => area(own.boxes[b]) - area(own.boxes[a]));
    for (const node of order) {
      const [x0, y0, x1, y1] = other.boxes[best.get(node).part];
      const crop = draw("svg", { ...match.place(1, own.boxes[node]), preserveAspectRatio: "none",
        viewBox: `${x0 * other.width} ${y0 * other.height} ${(x1 - x0) * other.width} ${(y1 - y0) * other.height}` });
      crop.append(draw("image", { width: other.width, height: other.height, href: other.src, preserveAspectRatio: "none" }));
      svg.append(crop);
    }
    svg.append(draw("image", { ...match.place(1, [0, 0, 1, 1]), preserveAspectRatio: "none",
      href: darkness(own.boxes, match.weights[0]), class: "dim" }));
  }

  const middle = (side, node) => {
    const { x, y, width, height } = match.place(side, match.sides[side].boxes[node]);
    return [x + width / 2, y + height / 2];
  };
  function drawAllFlows() {
    match.all.replaceChildren();
    if (view !== "flows") return;
    const most = Math.max(...match.flows.map((flow) => flow[2]), 1e-9);
    for (const [i, j, mass, cost] of [...match.flows].sort((a, b) => a[2] - b[2])) {
      const [[x1, y1], [x2, y2]] = [middle(0, i), middle(1, j)], width = 0.25 + 1.5 * mass / most;
      match.all.append(draw("line", { x1, y1, x2, y2, stroke: "#fff", "stroke-width": width + 0.35, opacity: 0.7 }),
        draw("line", { x1, y1, x2, y2, stroke: colorOf(cost), "stroke-width": width }));
    }
  }
  function applyLevel() {
    match.sides.forEach((_, side) => {
      const shown = new Set(levelOf(side));
      match.nodes[side].forEach((rect, node) => {
        rect.style.pointerEvents = shown.has(node) ? "all" : "none";
        rect.style.visibility = shown.has(node) ? "visible" : "hidden";
      });
    });
  }
  function drawSizes() {
    const words = match.levels[0].map((nodes) =>
      isWhole(match.sides[0].boxes[nodes[0]]) && nodes.length === 1 ? "Whole image" : `${nodes.length} parts`);
    const buttons = words.map((word, level) =>
      make("button", { type: "button", "data-level": level, "aria-pressed": String(level === match.level) }, word));
    find("sizes").replaceChildren(...(words.length < 2 || view === "rebuilt" ? [] : buttons));
  }

  function show(kind) {
    view = kind;
    for (const button of find("views").children) button.setAttribute("aria-pressed", String(button.dataset.view === view));
    match.on = null;
    drawStage();
    drawSizes();
    drawAllFlows();
    find("hint").textContent = HINTS[view];
    find("scale").hidden = view !== "flows";
    find("part").hidden = find("flows").hidden = view === "rebuilt";
    find("part").textContent = "";
    find("flows").replaceChildren();
    if (view === "rebuilt") return;
    applyLevel();
    const start = heaviest(levelOf(0));
    // The part that counts most is what people want to see first; beside all flows it would hide them.
    if (view === "parts") point(0, start);
    else match.nodes[0][start].setAttribute("tabindex", 0);
  }

  function point(side, node) {
    if (match.on && match.on[0] === side && match.on[1] === node) return;
    match.on = [side, node];
    const other = 1 - side, box = match.sides[side].boxes[node], weight = match.weights[side][node];
    const targets = match.flows.filter((flow) => flow[side] === node && flow[2] > 0)
      .map((flow) => ({ node: flow[other], mass: flow[2], cost: flow[3] })).sort((a, b) => b.mass - a.mass);
    const total = targets.reduce((sum, target) => sum + target.mass, 0) || 1;
    applyLevel();
    match.all.setAttribute("opacity", 0.25);
    for (const rect of match.nodes.flat()) { rect.classList.remove("on", "to"); rect.setAttribute("tabindex", -1); }
    const own = match.nodes[side][node];
    own.classList.add("on");
    own.setAttribute("tabindex", 0);
    own.style.visibility = "visible";
    match.marks.replaceChildren();
    // From near edge to near edge, so that the parts themselves stay visible.
    const near = (which, { x, y, width, height }) => match.tall
      ? [x + width / 2, which ? y : y + height] : [which ? x : x + width, y + height / 2];
    const [x1, y1] = near(side, match.place(side, box));
    const badges = [];
    targets.slice(0, SHOWN).forEach((target, rank) => {
      const rect = match.nodes[other][target.node];
      rect.classList.add("to");
      rect.style.visibility = "visible";
      const [x2, y2] = near(other, match.place(other, match.sides[other].boxes[target.node]));
      const line = { x1, y1, x2, y2 }, width = 0.4 + 1.4 * target.mass / total;
      match.marks.append(draw("line", { ...line, class: "edge", "stroke-width": width + 0.7 }),
        draw("line", { ...line, class: "line", "stroke-width": width }));
      const text = draw("text", { x: x2, y: y2, class: "badge-text" });
      text.textContent = rank + 1;
      badges.push(draw("circle", { cx: x2, cy: y2, r: 3, class: "badge" }), text);
    });
    match.marks.append(...badges);
    find("part").textContent = `${side ? "Neighbour" : "Query"}, ${nameOf(side, node)}: ${percent(weight)} of the weight`;
    const verb = side ? "from" : "to";
    const items = targets.slice(0, SHOWN).map((target) => make("li", {},
      `${percent(target.mass / total)} ${verb} ${nameOf(other, target.node)}, cost ${target.cost.toFixed(3)}`));
    if (targets.length > SHOWN) items.push(make("li", {}, `and ${targets.length - SHOWN} smaller ones`));
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
    const from = middle(...match.on);
    let best = null, least = Infinity;
    match.levels.forEach((_, side) => {
      for (const node of levelOf(side)) {
        const to = middle(side, node), dx = to[0] - from[0], dy = to[1] - from[1];
        const along = dx * step[0] + dy * step[1], aside = Math.abs(dx * step[1]) + Math.abs(dy * step[0]);
        const far = along + 2 * aside;
        if (along > 0.5 && aside <= 2 * along && far < least) { least = far; best = [side, node]; }
      }
    });
    if (best) { match.nodes[best[0]][best[1]].focus({ preventScroll: true }); point(...best); }
  });
  find("views").addEventListener("click", (event) => {
    const button = event.target.closest("[data-view]");
    if (button) show(button.dataset.view);
  });
  find("sizes").addEventListener("click", (event) => {
    const button = event.target.closest("[data-level]");
    if (!button) return;
    match.level = +button.dataset.level;
    match.on = null;
    for (const other of find("sizes").children) other.setAttribute("aria-pressed", String(other === button));
    applyLevel();
    point(0, heaviest(levelOf(0)));
  });
  const go = (step) => { const entry = match.step(step); if (entry) open(entry); };
  find("previous").addEventListener("click", () => go(-1));
  find("next").addEventListener("click", () => go(1));
  document.addEventListener("keydown", (event) => {
    const step = { PageUp: -1, PageDown: 1 }[event.key];
    if (step && match) { event.preventDefault(); go(step); }
  });
  find("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("close", () => {
    stage.replaceChildren();
    match?.opener.focus();
    match = null;
  });
  window.addEventListener("resize", () => {
    if (match && match.tall !== window.innerWidth < 640) show(view);
  });

  // entry: opener (the button that takes the focus back), query, index (of the other picture), text, and
  // step, which gives the entry so many places further on, or nothing.
  function open(entry) {
    const found = data.matches[`${entry.query} ${entry.index}`];
    if (!found) return;
    const sides = [picture(entry.query), picture(entry.index)];
    match = { ...entry, ...unpack(found), sides, levels: sides.map((side) => levelsOf(side.boxes)), level: 0 };
    const costs = match.flows.map((flow) => flow[3]);
    match.range = [Math.min(...costs), Math.max(...costs)];
    find("cheapest").textContent = match.range[0].toFixed(2);
    find("dearest").textContent = match.range[1].toFixed(2);
    find("match-title").textContent = `${sides[0].title} → ${sides[1].title}`;
    find("match-facts").textContent = [entry.text, `similarity by EMD ${match.similarity.toFixed(3)}`].join(" · ");
    find("previous").disabled = !entry.step(-1);
    find("next").disabled = !entry.step(1);
    const fresh = !dialog.open;
    if (fresh) dialog.showModal();
    show(view);
    if (fresh) dialog.scrollTop = 0;
    // What had the focus may be gone: a part of the match before, a button without a next one.
    const focus = document.activeElement;
    if (fresh || !dialog.contains(focus) || focus.disabled)
      (stage.querySelector(".node.on") ?? find("close")).focus({ preventScroll: true });
  }
  return open;
};
