"use strict";
(() => {
  // Datasets come column by column; repeated texts as codes into a list.
  const packed = JSON.parse(document.getElementById("datasets").textContent);
  const specs = JSON.parse(document.getElementById("specs").textContent);
  const unpacked = {};

  function rows(name) {
    if (!(name in unpacked)) {
      const { length, columns } = packed[name];
      const values = Object.entries(columns).map(([field, column]) =>
        [field, column.levels ? column.codes.map(code => column.levels[code]) : column.values]);
      unpacked[name] = Array.from({ length }, (_, i) => Object.fromEntries(values.map(([f, v]) => [f, v[i]])));
    }
    return unpacked[name];
  }

  // A legend above a narrow chart breaks into as many columns as have room for its texts.
  const NARROW = 640, LEGEND_COLUMN = 160, SYMBOL = 34, NARROW_GRADIENT = 90;  // pixels
  function fitLegends(node, columns) {
    if (node === null || typeof node !== "object") return;
    if (node.legend?.orient === "top") node.legend.columns = Math.min(node.legend.columns ?? columns, columns);
    if (node.legend?.gradientLength) node.legend.gradientLength = Math.min(node.legend.gradientLength, NARROW_GRADIENT);
    Object.entries(node).forEach(([key, inner]) => { if (key !== "datasets") fitLegends(inner, columns); });
  }
  function fit(spec, width) {
    if (width >= NARROW) return;
    const columns = Math.max(1, Math.floor(width / LEGEND_COLUMN));
    fitLegends(spec, columns);
    spec.config = { ...spec.config, legend: { ...spec.config.legend, labelLimit: Math.floor(width / columns) - SYMBOL } };
  }

  const drawn = new Map();
  function draw(element) {
    const name = element.dataset.figure;
    if (!drawn.has(name)) {
      const { uses, ...spec } = specs[name];
      fit(spec, element.clientWidth);
      // Each view gets rows of its own: Vega marks the ones it is given.
      spec.datasets = Object.fromEntries(uses.map(key => [key, rows(key).map(row => ({ ...row }))]));
      const options = {
        renderer: "svg",
        actions: { export: { svg: true, png: true }, source: false, compiled: false, editor: false },
        downloadFileName: name,
        tooltip: { theme: "custom" },
      };
      drawn.set(name, vegaEmbed(element, spec, options).then(result => {
        element.dataset.state = "drawn";
        return result;
      }).catch(error => {
        element.dataset.state = "failed";
        const line = document.createElement("p");
        line.className = "failed";
        line.textContent = `This figure could not be drawn: ${error.message}`;
        element.replaceChildren(line);
        console.error(name, error);
      }));
    }
    return drawn.get(name);
  }

  const charts = [...document.querySelectorAll("[data-figure]")];
  const near = new IntersectionObserver(entries => {
    for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "600px" });
  charts.forEach(chart => near.observe(chart));
  window.drawAll = () => Promise.all(charts.map(draw));
  window.addEventListener("beforeprint", window.drawAll);
  window.figures = drawn;

  // Tables
  const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
  for (const table of document.querySelectorAll(".table")) {
    const body = table.querySelector("tbody"), headings = [...table.querySelectorAll("th")];
    const original = [...body.rows];
    const key = (row, i) => row.cells[i].dataset.value ?? row.cells[i].textContent;
    headings.forEach((heading, i) => heading.querySelector("button").addEventListener("click", () => {
      const isNumber = heading.classList.contains("number");
      const first = isNumber ? "descending" : "ascending", second = isNumber ? "ascending" : "descending";
      const order = heading.getAttribute("aria-sort");
      const next = order === first ? second : order === second ? null : first;
      headings.forEach(other => other.removeAttribute("aria-sort"));
      if (next === null) { body.append(...original); return; }
      heading.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const missing = text => isNumber && text === "";
      body.append(...[...original].sort((a, b) => {
        const [x, y] = [key(a, i), key(b, i)];
        if (missing(x) || missing(y)) return missing(x) - missing(y);
        return sign * (isNumber ? x - y : collator.compare(x, y));
      }));
    }));
    table.querySelector("input")?.addEventListener("input", event => {
      const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const row of original) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every(word => text.includes(word));
      }
    });
    table.querySelector(".csv")?.addEventListener("click", event => {
      const quote = text => /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
      const lines = [headings.map(h => h.textContent.trim()), ...[...body.rows].map(row =>
        [...row.cells].map(cell => cell.dataset.value ?? cell.textContent))];
      const text = lines.map(line => line.map(quote).join(",")).join("\n") + "\n";
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
      link.download = event.target.dataset.name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    });
  }

  // Where we are
  const links = new Map([...document.querySelectorAll("nav a")].map(a => [a.hash.slice(1), a]));
  const visible = new Set();
  const spy = new IntersectionObserver(entries => {
    for (const entry of entries) entry.isIntersecting ? visible.add(entry.target.id) : visible.delete(entry.target.id);
    const first = [...links.keys()].find(id => visible.has(id));
    for (const [id, link] of links) {
      link.classList.toggle("here", id === first);
      id === first ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
    }
  }, { rootMargin: "-20% 0px -60% 0px" });
  document.querySelectorAll("main > section").forEach(section => spy.observe(section));
})();
