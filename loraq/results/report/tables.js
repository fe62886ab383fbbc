// Tables: a click on a column's title sorts by its values, the best first if the title shows a
// direction; a second click reverses the order, a third restores the original one. Empty cells stay
// last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const original = [...body.rows];
  const valueOf = (row, place) => row.cells[place].dataset.value;
  const turned = { ascending: "descending", descending: "ascending" };
  heads.forEach((head, place) => head.querySelector("button").addEventListener("click", (event) => {
    const first = event.currentTarget.dataset.first;
    const before = head.getAttribute("aria-sort");
    const order = before === null ? first : before === first ? turned[first] : null;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    if (order === null) return body.append(...original);
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const compare = (a, b) => {
      const [x, y] = [valueOf(a, place), valueOf(b, place)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const gap = Number(x) - Number(y);
      return sign * (Number.isNaN(gap) ? x.localeCompare(y) : gap);
    };
    body.append(...[...original].sort(compare));
  }));
}
