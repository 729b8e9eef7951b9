// The explorer's list: filters, and the neighbours of each query before and after. No libraries.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const STEP = 30; // queries drawn at once
  const EQUAL = 0.05; // percent points: smaller changes are no change
  const find = (id) => document.getElementById(id);

  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const picture = (index) => {
    const [jpeg, label, name, width, height, layout] = data.pictures[index];
    return { src: jpeg && `data:image/jpeg;base64,${jpeg}`, label, name, width, height,
      title: data.labelled ? data.classes[label] : name.split("/").pop(), boxes: layout < 0 ? null : data.layouts[layout] };
  };
  // A picture that is not at hand is its name.
  const thumbnail = (image, alt) => image.src
    ? make("img", { src: image.src, alt, loading: "lazy", decoding: "async" })
    : make("span", { class: "tile" }, image.name.split("/").pop());
  const changeOf = (scores, neighbours) => {
    if (!data.labelled) {
      const [before, after] = neighbours;
      if (before[0] !== after[0]) return "new first answer";
      return before.some((index, place) => index !== after[place]) ? "reordered" : "unchanged";
    }
    const [before, after] = scores;
    return after - before > EQUAL ? "improved" : before - after > EQUAL ? "worsened" : "unchanged";
  };

  const queries = data.queries.map(([index, scores, neighbours, similarities], number) => ({
    number, index, scores, neighbours, similarities,
    label: data.pictures[index][1], change: changeOf(scores, neighbours),
  }));
  const state = { change: "all", label: "", shown: [], drawn: 0 };
  const list = find("queries"), chooser = find("class");
  const openMatch = matchView(data, { make, picture, find });

  const labels = data.labelled ? [...new Set(queries.map((query) => query.label))] : [];
  labels.sort((a, b) => data.classes[a].localeCompare(data.classes[b]));
  for (const label of labels) chooser.append(make("option", { value: label }, data.classes[label]));

  const neighbourItem = (query, method, place) => {
    const index = query.neighbours[method][place];
    const other = picture(index), similarity = query.similarities[method][place];
    const right = data.labelled && other.label === query.label;
    const text = similarity === null ? (method ? "not compared" : "no score") : similarity.toFixed(3);
    const opens = `${query.index} ${index}` in data.matches;
    const verdict = data.labelled ? ` ${right ? "right" : "wrong"},` : "";
    const button = make("button", {
      type: "button", class: `neighbour ${data.labelled ? (right ? "right" : "wrong") : ""}${opens ? "" : " plain"}`,
      "data-query": query.number, "data-method": method, "data-place": place,
      "aria-label": `${data.methods[method]}, neighbour ${place + 1}: ${other.title},${verdict} similarity ${text}`,
      title: other.name,
    }, thumbnail(other, ""));
    if (data.labelled) button.append(make("b", { "aria-hidden": "true" }, right ? "✓" : "✗"));
    if (!opens) button.setAttribute("aria-disabled", "true");
    const caption = make("small", {}, text);
    if (!right) caption.append(make("br"), other.title);
    return make("li", {}, button, caption);
  };
  const saying = ({ scores, change }) =>
    data.labelled ? `${data.metric} ${scores[0].toFixed(0)} → ${scores[1].toFixed(0)}, ${change}` : change;
  const card = (query) => {
    const own = picture(query.index);
    const self = make("div", { class: "self" }, thumbnail(own, `query ${own.name}`), make("strong", {}, own.title),
      make("span", { class: `quiet change-${query.change.replaceAll(" ", "-")}` }, saying(query)));
    const rows = make("div", { class: "rows" });
    data.methods.forEach((name, method) => {
      const row = make("ol", { class: "row", "aria-label": `${name}: neighbours` });
      query.neighbours[method].forEach((index, place) => {
        if (index >= 0) row.append(neighbourItem(query, method, place));
      });
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

  const entryOf = (button) => {
    const query = queries[+button.dataset.query], method = +button.dataset.method, place = +button.dataset.place;
    const index = query.neighbours[method][place];
    const same = data.pictures[query.index][1] === data.pictures[index][1];
    const verdict = data.labelled ? (same ? "✓ same class" : "✗ other class") + " · " : "";
    return {
      opener: button, query: query.index, index,
      text: `${verdict}neighbour ${place + 1} of ${query.neighbours[method].length} by ${data.methods[method]}`,
      step: (by) => {
        const next = button.closest(".row").querySelectorAll(".neighbour")[place + by];
        return next && !next.classList.contains("plain") ? entryOf(next) : null;
      },
    };
  };

  find("filters").addEventListener("submit", (event) => event.preventDefault());
  find("filters").addEventListener("click", (event) => {
    const button = event.target.closest("[data-change]");
    if (button) { state.change = button.dataset.change; update(); }
  });
  chooser?.addEventListener("change", () => { state.label = chooser.value; update(); });
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
    const button = event.target.closest(".neighbour:not(.plain)");
    if (button) openMatch(entryOf(button));
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
    if (next) { next.focus(); next.scrollIntoView({ block: "nearest", inline: "nearest" }); }
  });

  update();
})();
