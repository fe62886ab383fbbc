// Mark the current section in the list of sections.
const links = [...document.querySelectorAll("nav.sections a")];
const sections = links.map((link) => document.querySelector(link.getAttribute("href")));
function mark() {
  const bottom = innerHeight + scrollY >= document.documentElement.scrollHeight - 2;
  const read = sections.filter((section) => section.getBoundingClientRect().top < innerHeight / 3);
  const place = bottom ? sections.length - 1 : Math.max(0, read.length - 1);
  links.forEach((link, number) => {
    if (number !== place) return link.removeAttribute("aria-current");
    if (link.hasAttribute("aria-current")) return;
    link.setAttribute("aria-current", "true");
    const box = link.closest("ul");
    box.scrollLeft = link.offsetLeft - box.offsetLeft - 24;
  });
}
addEventListener("scroll", mark, { passive: true });
addEventListener("resize", mark);
mark();
