// A click on the head of a column sorts its table; rows for reference stay below the others.
for (const table of document.querySelectorAll("table.sorts")) {
  const value = (row, at) => row.cells[at].dataset.value ?? row.cells[at].textContent.trim();
  table.querySelectorAll("thead th").forEach((head, at) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") !== "descending";
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const order = (a, b) => {
        const below = a.classList.contains("ref") - b.classList.contains("ref");
        const [x, y] = [value(a, at), value(b, at)];
        const known = (x === "") - (y === "");
        const more = isNaN(x) || isNaN(y) ? y.localeCompare(x) : y - x;
        return below || known || (falling ? more : -more);
      };
      const body = table.tBodies[0], marked = body.querySelector(".first-ref");
      body.append(...[...body.rows].sort(order));
      if (marked) {
        marked.classList.remove("first-ref");
        body.querySelector(".ref").classList.add("first-ref");
      }
    });
  });
}
