// Draws every figure with the colours of the page's own theme, and again when the reader switches between light and dark.
"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);

function paint(value, style) {
  if (typeof value === "string") return value.startsWith("var(") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
  if (Array.isArray(value)) return value.map((item) => paint(item, style));
  if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, paint(item, style)]));
  return value;
}

function draw() {
  const style = getComputedStyle(document.documentElement);
  for (const [id, figure] of Object.entries(charts)) {
    const painted = paint(figure, style);
    // a matrix stays square on a narrow screen, and its neighbour as high
    if (figure.square) painted.layout.height = Math.min(430, document.getElementById(id).clientWidth + 30);
    Plotly.react(id, painted.data, painted.layout, { displayModeBar: false, responsive: true });
  }
}

draw();
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
window.matchMedia("(min-width: 640px)").addEventListener("change", draw);
document.documentElement.dataset.drawn = "true";
