"use strict";

// Films: one hidden video holds all tiles of a clip; every canvas shows its part, so tiles cannot fall out of step.
for (const film of document.querySelectorAll(".film")) {
  const video = film.querySelector("video");
  const [play, back, forth] = [".play", ".back", ".forth"].map((name) => film.querySelector(name));
  const slider = film.querySelector("input");
  const output = film.querySelector("output");
  const speed = film.querySelector("select");
  const fps = Number(film.dataset.fps);
  const frames = Number(film.dataset.frames);
  const observed = Number(film.dataset.observed);
  const tiles = [...film.querySelectorAll("canvas")].map((canvas) => ({
    context: canvas.getContext("2d"), x: Number(canvas.dataset.x), y: Number(canvas.dataset.y),
    w: canvas.width, h: canvas.height,
  }));

  const draw = (time) => {
    if (video.readyState < 2) return;
    for (const tile of tiles) {
      tile.context.drawImage(video, tile.x, tile.y, tile.w, tile.h, 0, 0, tile.w, tile.h);
    }
    const frame = Math.min(frames - 1, Math.max(0, Math.floor(time * fps + 0.01)));
    slider.value = frame;
    output.textContent = frame < observed
      ? `observed ${frame + 1} of ${observed}` : `predicted step ${frame - observed + 1} of ${frames - observed}`;
    slider.setAttribute("aria-valuetext", output.textContent);
  };
  const show = (frame) => {
    video.pause();
    video.currentTime = ((frame + frames) % frames + 0.5) / fps;
  };
  const watch = () => video.requestVideoFrameCallback((_, { mediaTime }) => { draw(mediaTime); watch(); });
  if ("requestVideoFrameCallback" in video) watch();
  else video.addEventListener("timeupdate", () => draw(video.currentTime));
  video.addEventListener("seeked", () => draw(video.currentTime));
  const begin = () => { video.playbackRate = Number(speed.value); show(observed); };
  if (video.readyState >= 2) begin();
  else video.addEventListener("loadeddata", begin, { once: true });
  for (const name of ["play", "pause"]) {
    video.addEventListener(name, () => {
      play.textContent = video.paused ? "▶" : "❚❚";
      play.setAttribute("aria-label", video.paused ? "Play" : "Pause");
    });
  }
  play.addEventListener("click", () => (video.paused ? video.play() : video.pause()));
  back.addEventListener("click", () => show(Number(slider.value) - 1));
  forth.addEventListener("click", () => show(Number(slider.value) + 1));
  slider.addEventListener("input", () => show(Number(slider.value)));
  speed.addEventListener("change", () => { video.playbackRate = Number(speed.value); });

  // Moves while in sight, unless the reader asked for less motion or has taken the controls.
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) {
    let free = true;
    film.querySelector(".controls").addEventListener("pointerdown", () => { free = false; });
    film.querySelector(".controls").addEventListener("keydown", () => { free = false; });
    new IntersectionObserver(([entry]) => {
      if (!entry.isIntersecting) video.pause();
      else if (free) video.play().catch(() => {});
    }, { rootMargin: "-35% 0px" }).observe(film);
  }
}

// Charts: the numbers are those of the table below; pointer and slider read one step in all charts of a group.
const charts = [...document.querySelectorAll("figure.chart")].map((figure) => {
  const [plot, slider, output, list] = [".plot", "input", ".read output", ".readout"].map((s) => figure.querySelector(s));
  const curves = [...figure.querySelectorAll("tbody tr")].map((row, place) => ({
    name: row.querySelector("th").textContent.trim(), swatch: row.querySelector(".swatch"),
    values: [...row.querySelectorAll("td")].map((cell) => cell.textContent), place, shown: true,
  }));
  const [left, right, steps] = [Number(figure.dataset.left), Number(figure.dataset.right), Number(slider.max)];
  const cursor = figure.querySelector(".cursor");
  const show = (step) => {
    const at = Math.min(steps, Math.max(1, step));
    slider.value = at;
    output.textContent = at;
    cursor.style.display = "block";
    cursor.style.left = `${100 * (steps === 1 ? left : left + ((right - left) * (at - 1)) / (steps - 1))}%`;
    list.replaceChildren(...curves.map((curve) => {
      const [entry, name, value] = ["li", "span", "b"].map((tag) => document.createElement(tag));
      name.append(curve.swatch.cloneNode(), curve.name);
      value.textContent = curve.values[at - 1];
      entry.append(name, value);
      entry.classList.toggle("hidden", !curve.shown);
      return entry;
    }));
    const spoken = curves.filter((curve) => curve.shown).map((curve) => `${curve.name} ${curve.values[at - 1]}`);
    slider.setAttribute("aria-valuetext", `step ${at}: ${spoken.join(", ")}`);
  };
  const stepAt = (event) => {
    const box = plot.getBoundingClientRect();
    const across = (event.clientX - box.left) / box.width;
    return 1 + (right > left ? Math.round(((across - left) / (right - left)) * (steps - 1)) : 0);
  };
  const toggle = (name, shown) => {
    for (const curve of curves.filter((c) => c.name === name)) {
      curve.shown = shown;
      for (const mark of plot.querySelectorAll(`[class*="curve${curve.place}_"]`)) mark.classList.toggle("hidden", !shown);
    }
    show(Number(slider.value));
  };
  return { group: figure.parentElement, plot, slider, show, stepAt, toggle };
});
for (const chart of charts) {
  const together = charts.filter((other) => other.group === chart.group);
  const read = (step) => { for (const other of together) other.show(step); };
  chart.slider.addEventListener("input", () => read(Number(chart.slider.value)));
  for (const name of ["pointermove", "pointerdown"]) chart.plot.addEventListener(name, (e) => read(chart.stepAt(e)));
  chart.show(Number(chart.slider.value));
}
for (const button of document.querySelectorAll("[data-curve]")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    for (const chart of charts) chart.toggle(button.dataset.curve, shown);
  });
}

// Contents: the link of the section in sight is marked, and kept in sight itself.
const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
const bar = document.querySelector("nav ul");
const inSight = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((e) => e.isIntersecting)) {
    for (const link of links.values()) link.removeAttribute("aria-current");
    const link = links.get(entry.target.id);
    link.setAttribute("aria-current", "true");
    bar.scrollTo({ left: link.offsetLeft - bar.clientWidth / 2 + link.clientWidth / 2 });
  }
}, { rootMargin: "-20% 0px -75% 0px" });
for (const id of links.keys()) inSight.observe(document.getElementById(id));
