// Quality against memory: show the values of the mark under the pointer above the diagram.
for (const mark of document.querySelectorAll(".pareto .mark")) {
  const read = () => {
    const [name, numbers] = [document.createElement("strong"), mark.dataset.reading];
    name.textContent = mark.dataset.label;
    document.getElementById("reading").replaceChildren(name, `: ${numbers}`);
  };
  for (const event of ["pointerenter", "focus", "click"]) mark.addEventListener(event, read);
}
