// The player: shows the given and generated frames as a video, a strip and a timeline.

import { element, show } from "./elements.js";

const ICONS = {
  play: '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="M3 1.5v13l11-6.5z"/></svg>',
  pause: '<svg viewBox="0 0 16 16" aria-hidden="true"><path d="M3 2h4v12H3zM9 2h4v12H9z"/></svg>',
};
const HOLD_SECONDS = 0.8; // on the last frame, before the video starts again

export const player = {
  frames: [], // images, the given ones first
  given: 0,
  total: 0, // frames when the video is complete
  fps: 8,
  time: 0, // in frames
  playing: true,
  isLive: false, // at the end, wait for more frames instead of starting again
  last: 0,

  load(fps) {
    Object.assign(this, { frames: [], given: 0, total: 0, fps, time: 0, isLive: false });
    element("strip").replaceChildren();
  },

  async add(urls, isGiven) {
    const images = urls.map((url) => Object.assign(new Image(), { src: url, alt: "" }));
    await Promise.all(images.map((image) => image.decode()));
    for (const image of images) {
      const number = this.frames.push(image) - 1;
      image.addEventListener("click", () => this.seek(number));
      image.classList.toggle("given", isGiven);
      const gap = element("strip").querySelector("i");
      if (gap) gap.replaceWith(image);
      else element("strip").append(image);
    }
    if (isGiven) this.given = this.frames.length;
    this.total = Math.max(this.total, this.frames.length);
    this.refresh();
  },

  expect(count, aspect) {
    this.total = this.given + count;
    for (let number = 0; number < count; number++) {
      const gap = document.createElement("i");
      gap.style.aspectRatio = aspect;
      element("strip").append(gap);
    }
    this.refresh();
  },

  dropGaps() {
    for (const gap of element("strip").querySelectorAll("i")) gap.remove();
    this.total = this.frames.length;
    this.refresh();
  },

  refresh() {
    const has = this.frames.length > 0;
    show({ canvas: has, badge: has, timeline: has, frames: this.total > 0 });
    const generated = this.frames.length - this.given;
    const expected = this.total - this.given;
    show({ "given-count": this.given > 0, "generated-count": expected > 0 });
    element("given-count").textContent = `${this.given} given`;
    element("generated-count").textContent = `${generated < expected ? `${generated} of ${expected}` : generated} generated`;
    element("screen").classList.toggle("playing", has);
    const slider = element("position");
    slider.max = Math.max(1, this.total - 1);
    const percent = (frames) => `${(100 * frames) / Math.max(1, this.total)}%`;
    slider.style.setProperty("--end-given", percent(this.given));
    slider.style.setProperty("--end-generated", percent(this.frames.length));
    this.draw();
  },

  get number() {
    return Math.max(0, Math.min(this.frames.length - 1, Math.floor(this.time)));
  },

  draw() {
    const image = this.frames[this.number];
    if (!image) return;
    const canvas = element("canvas");
    const scale = Math.max(1, Math.ceil(640 / Math.max(image.naturalWidth, image.naturalHeight)));
    const [width, height] = [image.naturalWidth * scale, image.naturalHeight * scale];
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(image, 0, 0, width, height);
    const isGenerated = this.number >= this.given;
    element("screen").classList.toggle("generated", isGenerated);
    element("badge").textContent = isGenerated ? "generated" : "given";
    element("position").value = this.number;
    element("position").setAttribute("aria-valuetext", `${isGenerated ? "generated" : "given"} frame ${this.number + 1}`);
    element("time").textContent = `frame ${this.number + 1} of ${this.total}`;
    for (const other of element("strip").querySelectorAll(".current")) other.classList.remove("current");
    image.classList.add("current");
  },

  seek(number) {
    this.setPlaying(false);
    this.time = Math.min(number, this.frames.length - 1);
    this.draw();
  },

  setPlaying(playing) {
    this.playing = playing;
    element("play").innerHTML = playing ? ICONS.pause : ICONS.play;
    element("play").setAttribute("aria-label", playing ? "Pause" : "Play");
  },

  tick(now) {
    const seconds = Math.min(0.25, (now - this.last) / 1000);
    this.last = now;
    if (this.playing && this.frames.length > 1) {
      const before = this.number;
      this.time += seconds * this.fps;
      if (this.isLive) this.time = Math.min(this.time, this.frames.length - 0.001);
      else if (this.time >= this.frames.length + HOLD_SECONDS * this.fps) this.time = 0;
      if (this.number !== before) this.draw();
    }
    requestAnimationFrame((next) => this.tick(next));
  },
};
