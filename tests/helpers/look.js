// What of a page is cut; its text with the least contrast; what scrolls, and whether it shows it; the tooltip of a point.
const light = (color) => {
  const [r, g, b] = color.match(/[\d.]+/g).map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (one) => {
  for (; one; one = one.parentElement) {
    const color = view.getComputedStyle(one).backgroundColor;
    if (!/, 0\)$|transparent/.test(color)) return color;
  }
  return "rgb(255, 255, 255)";
};
const contrasts = [...page.querySelectorAll("main *")].filter((one) => [...one.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()))
  .filter((one) => one.getClientRects().length).map((one) => {
    const style = view.getComputedStyle(one);
    const [a, b] = [light(one.closest("svg") ? style.fill : style.color), light(behind(one))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), one.textContent.trim()];
  });
const wide = page.documentElement.clientWidth;
const cut = [...page.querySelectorAll("main *")].filter((one) => !one.closest(".scroll") && one.getBoundingClientRect().right > wide + 1)
  .map((one) => one.outerHTML.slice(0, 90));
const scrolling = [...page.querySelectorAll(".scroll")].filter((one) => one.scrollWidth > one.clientWidth + 1 || one.scrollHeight > one.clientHeight + 1);
const unmarked = scrolling.filter((one) => !view.getComputedStyle(one).backgroundImage.includes("gradient")).length;
const dot = [...page.querySelectorAll(".chart path")].find((one) => /curve: |run: .*sparsity: /.test(one.getAttribute("aria-label") || ""));
let said = "";
if (dot) {
  const { left, top, width, height } = dot.getBoundingClientRect();
  const at = { bubbles: true, clientX: left + width / 2, clientY: top + height / 2, view };
  for (const kind of ["pointerover", "mouseover", "pointermove", "mousemove"]) dot.dispatchEvent(new view.MouseEvent(kind, at));
  said = page.getElementById("vg-tooltip-element")?.innerText || "";
}
return {
  least: contrasts.sort((a, b) => a[0] - b[0])[0], texts: contrasts.length, cut, unmarked, scrolling: scrolling.length, said,
  high: page.documentElement.scrollHeight, background: view.getComputedStyle(page.body).backgroundColor,
  widest: Math.max(...[...page.querySelectorAll(".chart svg")].map((one) => one.getBoundingClientRect().width)),
  counts: [...page.querySelectorAll(".layers .kept")].map((one) => { const box = one.getBoundingClientRect();
    return box.width > 0 && box.right <= wide && one.innerText; }),
};
