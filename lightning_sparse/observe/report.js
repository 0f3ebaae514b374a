// Draws the charts of the page; the time it took is left in data-ready, for whoever measures it.
const { config, specs } = JSON.parse(document.getElementById("charts").textContent);
const options = { renderer: "svg", actions: false, defaultStyle: false, config, tooltip: { disableDefaultStyle: true } };
const views = new Map();
Promise.allSettled(Object.entries(specs).map(([id, spec]) => vegaEmbed("#" + id, spec, options))).then((drawn) => {
  const failed = drawn.filter((one) => one.status === "rejected");
  failed.forEach((one) => console.error(one.reason));
  drawn.filter((one) => one.value).forEach((one) => views.set(one.value.view.container().id, one.value.view));
  Object.assign(document.documentElement.dataset, { failed: failed.length, ready: Math.round(performance.now()) });
});
// A series that is picked in a legend stands out: in the chart of the legend, or in all where it belongs to none.
document.querySelectorAll(".key").forEach((key) => key.addEventListener("click", () => {
  const area = key.closest("figure") || document;
  const shown = key.getAttribute("aria-pressed") === "true" ? "" : key.dataset.series;
  area.querySelectorAll(".key").forEach((one) => one.setAttribute("aria-pressed", String(one.dataset.series === shown)));
  area.querySelectorAll(".chart").forEach((chart) => views.get(chart.id)?.signal("shown", shown).run());
}));
// On paper everything is shown.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
