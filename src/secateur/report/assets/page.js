(() => {
  "use strict";
  // Native <title> tips work without this script; with it they are quicker, styled, and follow the arrow keys.
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  const live = document.createElement("div");
  live.className = "unseen";
  live.setAttribute("aria-live", "polite");
  document.body.append(tip, live);
  let on = null;

  const place = (x, y) => {
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, x + 14), innerWidth - box.width - 8);
    const top = y + 18 + box.height > innerHeight ? y - box.height - 14 : y + 18;
    tip.style.transform = `translate(${Math.max(8, left)}px, ${Math.max(8, top)}px)`;
  };
  const hide = () => {
    if (on) on.classList.remove("on");
    on = null;
    tip.hidden = true;
  };
  const show = (mark) => {
    if (on !== mark) {
      hide();
      on = mark;
      mark.classList.add("on");
      tip.textContent = mark.dataset.tip;
      tip.hidden = false;
    }
  };

  for (const mark of document.querySelectorAll(".mark")) {
    const title = mark.querySelector("title");
    mark.dataset.tip = title.textContent;
    title.remove();
  }
  document.addEventListener("pointermove", (event) => {
    const mark = event.target instanceof Element ? event.target.closest(".mark") : null;
    if (!mark) return hide();
    show(mark);
    place(event.clientX, event.clientY);
  });
  document.addEventListener("pointerdown", (event) => {
    const mark = event.target instanceof Element ? event.target.closest(".mark") : null;
    if (!mark) return hide();
    show(mark);
    place(event.clientX, event.clientY);
  });
  addEventListener("scroll", hide, { passive: true });

  for (const plot of document.querySelectorAll(".plot svg")) {
    const marks = [...plot.querySelectorAll(".mark")];
    let at = -1;
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") return hide();
      if (event.key === "Home") at = 0;
      else if (event.key === "End") at = marks.length - 1;
      else if (step) at = Math.min(Math.max(at + step, 0), marks.length - 1);
      else return;
      if (!marks.length) return;
      event.preventDefault();
      show(marks[at]);
      live.textContent = marks[at].dataset.tip;
      const box = marks[at].getBoundingClientRect();
      place(box.x + box.width / 2, box.y + box.height / 2);
    });
  }
})();
