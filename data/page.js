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

// Charts: names hide and show curves everywhere; the pointer reads one step.
for (const button of document.querySelectorAll("[data-curve]")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    for (const curve of document.querySelectorAll(".curve")) {
      if (curve.dataset.name === button.dataset.curve) curve.classList.toggle("hidden", !shown);
    }
  });
}
for (const chart of document.querySelectorAll("svg.chart")) {
  const readout = chart.parentElement.querySelector(".readout");
  const cursor = chart.querySelector(".cursor");
  const [left, right, steps] = ["left", "right", "steps"].map((name) => Number(chart.dataset[name]));
  chart.addEventListener("pointermove", (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse()).x;
    const step = Math.min(steps, Math.max(1, 1 + Math.round(((at - left) / (right - left)) * (steps - 1))));
    const x = steps === 1 ? (left + right) / 2 : left + ((right - left) * (step - 1)) / (steps - 1);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    cursor.style.visibility = "visible";
    const lines = [...chart.querySelectorAll(".curve:not(.hidden)")].map((curve) => {
      const entry = document.createElement("span");
      const value = document.createElement("b");
      value.className = [...curve.classList].find((name) => /^c\d$/.test(name));
      value.textContent = curve.dataset.values.split(",")[step - 1] || "–";
      entry.append(`${curve.dataset.name} `, value, "  ");
      return entry;
    });
    readout.replaceChildren(`step ${step}:  `, ...lines);
  });
  chart.addEventListener("pointerleave", () => {
    cursor.style.visibility = "hidden";
    readout.replaceChildren();
  });
}
