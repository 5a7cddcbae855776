// The page: choose a file or noise, request a video, and show its frames as they arrive.

import { element, show } from "./elements.js";
import { player } from "./player.js";

const form = element("settings");
const field = (name) => form.elements.namedItem(name);

const SAMPLER_HINTS = {
  rotation: "DDIM. With few steps, uncertain frames become blurred averages.",
  adams: "Second order: accurate with few steps, such as 8.",
  dpm2m: "DPM-Solver++ (2M), the usual choice in the field.",
  tangent: "Euler. Keeps the variety of the samples if there are many steps.",
  stochastic: "Adds fresh noise in each step. Needs many steps.",
};

let model; // the answer of /api/model
let waiting; // the file that was given before that answer
let source = null; // null, "noise", or the answer to an upload, {id, fps, duration, images}, with {file, start}
let job = null; // {id, stream, seed, total} while a video is generated

// ---------------------------------------------------------------- small helpers

function say(text, isError = false) {
  const message = element("message");
  message.textContent = text;
  message.classList.toggle("error", isError);
  message.setAttribute("role", isError ? "alert" : "status");
  message.hidden = !text;
}

function showProgress(fraction) {
  element("progress").hidden = fraction === null;
  element("progress").classList.toggle("busy", fraction === undefined);
  element("bar").style.width = fraction === undefined || fraction === null ? "" : `${100 * fraction}%`;
}

function duration(seconds) {
  if (seconds < 1.5) return "1 second";
  if (seconds < 90) return `${Math.round(seconds)} seconds`;
  return `${Math.round(seconds / 60)} minutes`;
}

async function answerOf(response) {
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(answer.error || `The server answered ${response.status}.`);
  return answer;
}

async function fetchJson(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server cannot be reached.");
  }
  return answerOf(response);
}

function post(path, content) {
  return fetchJson(path, { method: "POST", body: JSON.stringify(content), headers: { "Content-Type": "application/json" } });
}

// ---------------------------------------------------------------- the source: a file or noise

function upload(file, start, onProgress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch does not report the progress of an upload
    const query = new URLSearchParams(start === null ? { name: file.name } : { name: file.name, start });
    request.open("POST", `api/uploads?${query}`);
    request.setRequestHeader("Content-Type", "application/octet-stream");
    request.upload.onprogress = (event) => onProgress(event.loaded / event.total);
    request.onerror = () => reject(new Error("The server cannot be reached, or refused the file."));
    request.onload = () => resolve(answerOf(new Response(request.responseText, { status: request.status })));
    request.send(file);
  });
}

// Send a file, and show its frames from `start` on, in seconds; null: the last ones.
async function useFile(file, start = null) {
  if (!file || job) return;
  if (!model) {
    waiting = file;
    return say(`${file.name} is used as soon as the model is ready…`);
  }
  const limit = model.limits.upload;
  if (file.size > limit * 1e6) {
    return say(`${file.name} is larger than ${limit} MB: give a smaller file, or start the server with a larger --max_upload.`, true);
  }
  setBusy(true);
  try {
    const answer = await upload(file, start, (fraction) => {
      showProgress(fraction < 1 ? fraction : undefined);
      say(fraction < 1 ? `Sending ${file.name}…` : `Reading ${file.name}…`);
    });
    source = { ...answer, file, start };
    if (start === null) offerStarts();
    show({ start: false, remark: false });
    player.load(answer.fps);
    await player.add(answer.images, true);
    player.setPlaying(true);
    const [count, seconds] = [answer.images.length, answer.images.length / answer.fps];
    const which = start === null ? `The last ${count} frames that the model uses` : `${count} frames from ${start.toFixed(1)} s on`;
    const what = answer.duration === 0 ? "The image is given." : `${which} (${seconds.toFixed(1)} s) are given.`;
    say(`${what} Press “${actionName()}”.`);
    element("results").hidden = false;
    element("download").hidden = true;
  } catch (error) {
    say(error.message, true);
    if (source) field("start").value = source.start ?? field("start").max;
  }
  showProgress(null);
  setBusy(false);
}

// The time at which the given frames begin; null for the last ones.
function chosenStart() {
  const slider = field("start");
  return slider.value === slider.max ? null : Number(slider.value);
}

// Let the slider reach from the beginning of the video to its last frames, which are chosen first.
function offerStarts() {
  const given = (source.images.length - 1) / source.fps; // seconds from the first given frame to the last
  const latest = Math.ceil(10 * Math.max(0, source.duration - given)) / 10;
  Object.assign(field("start"), { max: latest, value: latest });
}

function useNoise() {
  source = "noise";
  show({ start: false });
  player.load(model.frame_rate);
  player.refresh();
  refreshForm();
  generate();
}

function forget() {
  source = null;
  player.load(model.frame_rate);
  player.refresh();
  show({ start: true, results: false, remark: false });
  say("");
  refreshForm();
}

// ---------------------------------------------------------------- settings

function actionName() {
  if (source === "noise") return "Generate a video";
  if (player.frames.length > player.given) return "Continue it again";
  return source && source.images.length === 1 ? "Continue the image" : "Continue the video";
}

function refreshForm() {
  if (!model) return;
  const fps = source && source !== "noise" ? source.fps : model.frame_rate;
  const seconds = Number(field("seconds").value);
  show({ "start-field": source !== null && source !== "noise" && Number(field("start").max) > 0 });
  element("start-time").textContent = chosenStart() === null ? "the last ones" : `from ${chosenStart().toFixed(1)} s on`;
  element("duration").textContent = `${seconds} s, ${Math.max(1, Math.round(seconds * fps))} frames`;
  element("sampler-hint").textContent = SAMPLER_HINTS[field("sampler").value] || "";
  show({ "size-field": model.sizes.length > 1 && source === "noise" });
  show({ "label-guidance-field": field("label").value !== "" });
  element("generate").textContent = actionName();
  element("generate").disabled = source === null;
}

function setBusy(isBusy) {
  for (const id of ["choose", "noise", "generate", "other"]) element(id).disabled = isBusy;
  field("start").disabled = isBusy;
  if (!isBusy) refreshForm();
}

function settings() {
  const number = (name) => (field(name).value === "" ? null : Number(field(name).value));
  return {
    context: source === "noise" ? null : source.id,
    seconds: number("seconds"),
    sampler: field("sampler").value,
    steps: number("steps"),
    guidance: number("guidance"),
    label: field("label").value || null,
    label_guidance: field("label").value ? number("label_guidance") : null,
    seed: number("seed"),
    size: source === "noise" && model.sizes.length > 1 ? field("size").value : null,
  };
}

function fillForm() {
  const { initial, limits } = model;
  const options = (select, values) => {
    for (const value of values) select.add(new Option(value, value));
  };
  options(field("sampler"), model.samplers);
  options(field("label"), model.labels);
  options(field("size"), model.sizes);
  Object.assign(field("seconds"), { min: Math.min(0.5, limits.seconds), max: limits.seconds });
  Object.assign(field("steps"), { max: limits.steps });
  Object.assign(field("guidance"), { max: limits.guidance });
  Object.assign(field("label_guidance"), { max: limits.guidance });
  Object.assign(field("seed"), { max: limits.seed });
  for (const [name, value] of Object.entries(initial)) field(name).value = value;
  show({ "label-field": model.labels.length > 0 });
  const sizes = model.sizes.length > 3 ? `${model.sizes.length} sizes` : model.sizes.join(", ");
  element("model").textContent = `${model.name} · ${sizes} pixels · ${Number(model.frame_rate.toFixed(2))} frames per second`;
  element("accepted").textContent = `Videos of at most ${limits.upload_seconds} s, or images; at most ${limits.upload} MB.`;
}

// ---------------------------------------------------------------- generation

async function generate() {
  if (job || source === null || !form.reportValidity()) return;
  if (player.frames.length > player.given && element("new-seed").checked) {
    field("seed").value = (Number(field("seed").value) + 1) % (model.limits.seed + 1);
  }
  setBusy(true);
  try {
    const content = settings();
    const { id } = await post("api/videos", content);
    job = { id, stream: new EventSource(`api/videos/${id}/events`), seed: content.seed };
    listen(job);
    show({ stop: true, generate: false, results: false, remark: false });
    element("stop").disabled = false;
    say("Waiting for the model…");
    showProgress(undefined);
  } catch (error) {
    say(error.message, true);
    setBusy(false);
  }
}

function listen({ id, stream }) {
  let done = Promise.resolve(); // events are handled in their order, though images are decoded asynchronously
  const on = (kind, handle) =>
    stream.addEventListener(kind, (event) => {
      const content = JSON.parse(event.data);
      done = done.then(() => handle(content)).catch((error) => finish(error.message, true));
    });
  on("queued", ({ before }) => before && say(`Waiting: ${before === 1 ? "one video is" : `${before} videos are`} generated before yours.`));
  on("started", async (content) => {
    job.total = content.frames;
    player.load(content.fps);
    if (source !== "noise") await player.add(source.images, true);
    player.expect(content.frames, content.width / content.height);
    player.isLive = true;
    player.setPlaying(true);
    say(`Generating ${content.frames} frames…`);
  });
  on("remark", ({ message }) => {
    element("remark").textContent = message;
    show({ remark: true });
  });
  on("frames", async ({ images, frames, seconds_left }) => {
    await player.add(images, false);
    element("strip").scrollTop = player.frames.at(-1).offsetTop - element("strip").offsetTop - 100;
    showProgress(frames / job.total);
    const left = frames < job.total ? `, about ${duration(seconds_left)} left` : "";
    say(`Generated ${frames} of ${job.total} frames${left}.`);
  });
  on("done", ({ frames, seconds, stopped, video }) => {
    const count = `${frames} frame${frames === 1 ? "" : "s"}`;
    element("download").hidden = !video;
    element("download").href = `api/videos/${id}.mp4`;
    const name = source === "noise" ? "generated" : `${source.file.name.replace(/\.[^.]*$/, "")}-continued`;
    element("download").download = `${name}.mp4`;
    finish(`${stopped ? `Stopped after ${count}` : `Generated ${count} in ${duration(seconds)}`}, with seed ${job.seed}.`);
  });
  on("failed", ({ message }) => finish(message, true));
  stream.onerror = () => {
    if (stream.readyState === EventSource.CLOSED) finish("The connection to the server was lost, and the video with it.", true);
    else say("The connection was lost. Trying again…");
  };
}

function finish(text, isError = false) {
  job?.stream.close();
  job = null;
  player.isLive = false;
  player.dropGaps();
  if (isError && player.frames.length === player.given) element("download").hidden = true;
  show({ stop: false, generate: true, results: source !== null });
  showProgress(null);
  say(text, isError);
  setBusy(false);
}

async function stop() {
  element("stop").disabled = true;
  say("Stopping after the present frames…");
  await post(`api/videos/${job.id}/stop`, {}).catch((error) => say(error.message, true));
}

// ---------------------------------------------------------------- start

function connect() {
  element("choose").addEventListener("click", () => element("file").click());
  element("other").addEventListener("click", forget);
  element("noise").addEventListener("click", useNoise);
  element("file").addEventListener("change", (event) => {
    useFile(event.target.files[0]);
    event.target.value = "";
  });
  element("stop").addEventListener("click", stop);
  field("start").addEventListener("change", () => useFile(source.file, chosenStart()));
  element("play").addEventListener("click", () => player.setPlaying(!player.playing));
  element("position").addEventListener("input", (event) => player.seek(Number(event.target.value)));
  form.addEventListener("input", refreshForm);
  // A browser shows no message at an invalid field of a section that is closed.
  form.addEventListener("invalid", ({ target }) => target.closest("details")?.setAttribute("open", ""), true);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  let depth = 0; // a drag enters and leaves every element on its way
  addEventListener("dragenter", () => show({ drop: ++depth > 0 && !job }));
  addEventListener("dragleave", () => show({ drop: --depth > 0 }));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    show({ drop: false });
    useFile(event.dataTransfer.files[0]);
  });
}

try {
  player.setPlaying(!matchMedia("(prefers-reduced-motion: reduce)").matches);
  connect();
  model = await fetchJson("api/model");
  fillForm();
  setBusy(false);
  player.tick(performance.now());
  if (waiting) useFile(waiting);
} catch (error) {
  say(error.message, true);
}
