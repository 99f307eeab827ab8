// The page's script, in this order: limits, texts, memory, words of a reply, words of a recogniser, the state and what
// shows it, turns, the session over HTTP, the connection, requests and replies, voice out, voice in, writing, the
// camera, the conversations of the past, the first screen, start.
"use strict";

// ---- Limits ----
const SAID_MS = 3000; // over the camera, the person's own words leave after this
const AFTER_VOICE_MS = 1000; // and a reply after its voice has ended
const READING_MS = 3000, READING_MS_A_CHARACTER = 90; // or, unread, after the time that reading takes
const PING_MS = 15000;
const PONG_MS = 2000; // a socket that answers no ping for so long is dead, though the browser shows it as open
const IDLE_PONG_MS = 5000; // the same while nothing is asked
const OPENING_MS = 4000; // for a WebSocket's handshake
const FETCH_MS = 4000; // for an answer over HTTP
const CHECK_MS = 1000; // words wait so long for the answer whether their session still exists
const RESUME_MS = 1500; // a server that still has the reply sends it again within this time after a reconnect
const LOST_MS = 40000; // without any frame of a reply
const FIRST_PAUSE_MS = 500, MOST_PAUSE_MS = 30000; // between two attempts to connect
const WAITING_PAUSE_MS = 1500; // the same while words wait to be sent
const MOST_RESENT = 2; // times that a lost request is sent again before the person is asked
const SILENCE_MS = 2500; // ends what a person says
const FIRST_WORDS_MS = 20000; // until the first word
const ENDING_MS = 1000; // for a recogniser to end after it was told to
const BRIEF_MS = 500, MOST_BRIEF = 3; // a recogniser that ends so soon, so often in a row, does not work
const NO_VOICE_MS = 4000; // for a voice to begin
const UTTERANCE_CHARACTERS = 80; // Chrome falls silent about 15 s into one utterance
const MESSAGE_CHARACTERS = 2000; // of one request
const FOLD_CHARACTERS = 160, FOLD_LINES = 4; // the person's own words are folded beyond this
const LAST_TURNS = 10; // that a return visit shows
const PAGE_TURNS = 50, MOST_TURNS = 200; // of one answer of the server
const LOW_PIXELS = 560; // a page of less height is one scrolling column

// ---- Texts that the document does not hold ----
const TEXTS = {
  whoModel: "사람이 아니라 생성형 AI가 답합니다. 치료나 진단을 대신하지 않습니다.",
  whoDemo: "체험 모드입니다. 사람이 아니라 컴퓨터가 미리 준비한 문장으로 답합니다. 치료나 진단을 대신하지 않습니다.",
  kept: "나눈 대화는 이 서버에 저장되며, ‘지난 대화’에서 지울 수 있습니다.",
  keptDays: "나눈 대화는 이 서버에 저장되며, ‘지난 대화’에서 지울 수 있습니다. 마지막 대화에서 {days}일이 지나면 지워집니다.",
  sentGemini: "답을 만들기 위해 말씀하신 내용을 Google Gemini로 보냅니다.",
  sentOpenai: "답을 만들기 위해 말씀하신 내용을 운영자가 정한 AI 모델({model})로 보냅니다.",
  sentDemo: "말씀하신 내용을 AI 회사로 보내지 않습니다.",
  sentVoice: "음성은 브라우저 제조사의 서버로 보내져 글로 바뀔 수 있습니다.",
  hintVoice: "버튼을 누르고 말하거나 글로 적어 주세요. 말을 마치고 잠시 기다리면 보내고, 답은 소리로도 들려 드립니다. "
    + "옆에 듣는 사람이 있다면 아래 ‘읽어 주기’를 ‘끄기’로 바꿔 주세요.",
  hintWrite: "이 브라우저는 말을 글로 바꾸지 못합니다. 아래에 글로 적어 주세요.",
  connecting: "연결하는 중", connected: "연결됨", disconnected: "연결 안 됨",
  listening: "듣는 중", thinking: "생각 중", speaking: "말하는 중", answering: "답하는 중", generating: "응답 생성 중",
  speak: "말하기", press: "듣는 중 (누르면 보내기)", none: "선택 안 함", unfold: "모두 보기", fold: "접기",
  reply: "AI의 답", replyDemo: "체험용 답", again: "다시 묻기", call: "{number} 전화", text: "{number} 문자",
  waitsConnection: "지금은 연결이 끊겨 있습니다. 다시 연결되면 바로 보냅니다.", waitsTurn: "앞의 답이 끝나면 이어서 답합니다.",
  lost: "답을 받지 못했습니다.", cut: "답이 여기서 멈췄습니다.", cutBefore: "답하기 전에 멈췄습니다.",
  retryIn: "{seconds}초 뒤에 다시 보낼 수 있습니다.", noServer: "지금은 서버에 연결할 수 없습니다. 잠시 뒤에 다시 해 주세요.",
  renewed: "지난 대화가 만료되어 새 대화로 이어 갑니다.", gone: "지난 대화가 지워졌거나 만료되어 새 대화로 이어 갑니다.",
  erased: "대화를 모두 지웠습니다.", erasedElsewhere: "다른 창에서 대화를 모두 지웠습니다.",
  micRefused: "마이크가 허용되지 않았습니다. 브라우저 설정에서 허용하거나 글로 적어 주세요.",
  micMissing: "마이크를 찾지 못했습니다. 글로 적어 주세요.", micFailed: "음성 인식이 되지 않습니다. 글로 적어 주세요.",
  micNetwork: "음성 인식에 연결하지 못했습니다. 글로 적어 주세요.", notHeard: "잘 듣지 못했습니다. 다시 말하거나 글로 적어 주세요.",
  heardSoFar: "듣던 말을 아래에 적어 두었습니다. 이어서 적거나 보내 주세요.", noVoice: "소리로 읽지 못했습니다. 글로 읽어 주세요.",
  noKorean: "이 기기에 한국어 목소리가 없어 글로만 답합니다.", noCamera: "카메라를 쓸 수 없습니다.",
  nothingYet: "아직 나눈 대화가 없습니다.", file: "BeMore-대화-AI가-쓴-답", me: "나",
  fileTop: "‘AI’의 답은 사람이 아니라 생성형 AI({model})가 쓴 것입니다.",
  fileTopDemo: "‘AI’의 답은 사람이 아니라 컴퓨터가 미리 준비한 문장입니다.",
};
const EMOTIONS = {
  happy: "행복", sad: "슬픔", angry: "화남", anxious: "불안", neutral: "보통", surprised: "놀람", disgusted: "불쾌", fearful: "두려움",
};

const $ = (id) => document.getElementById(id);
const text = (name, values = {}) => TEXTS[name].replace(/\{(\w+)\}/g, (_, key) => values[key]);

function make(tag, className = "", words = "", properties = {}) {
  return Object.assign(document.createElement(tag), { className, textContent: words, ...properties });
}

// ---- Memory, which a browser may refuse, empty or hold broken ----
const memory = {
  get(key, place = "localStorage") {
    try {
      return JSON.parse(window[place].getItem(`bemore-${key}`));
    } catch {
      return null;
    }
  },
  set(key, value, place = "localStorage") {
    try {
      if (value === null) window[place].removeItem(`bemore-${key}`);
      else window[place].setItem(`bemore-${key}`, JSON.stringify(value));
    } catch {} // blocked or full: the page works without a memory
  },
};

// ---- Words of a reply: what is shown, what is read aloud, whom to call ----
const NUMBERS = ["1577-0199", "1366", "1388", "109", "112", "117", "119"];
const digits = (number) => number.replace(/\d/g, (digit) => "공일이삼사오육칠팔구"[digit]).replace("-", " ");
// The server and the model spell a number for a voice (109, 일공구). The eye does not need the spelling.
const SPELT = new RegExp(NUMBERS.map((n) => `(?<=(?<!\\d)${n}번?)[,\\s]*\\(?${digits(n).replace(" ", "[,\\s]*")}번?\\)?`).join("|"), "g");
const SAID = new RegExp(`(?<![\\d,.-])(?:${NUMBERS.join("|")})(?![\\d명개원년호층점살세쪽]|[-,.]\\d)`, "g");
const EMOJI = /\p{Extended_Pictographic}|[\u{1F1E6}-\u{1F1FF}\u{1F3FB}-\u{1F3FF}\u{E0020}-\u{E007F}\uFE0F\u200D\u20E3]/gu;

/** Return a reply, or the part of it that has arrived, without Markdown, links, brackets, emoji and emoticons. */
function shown(words) {
  return words
    .replace(SPELT, "")
    .replace(/!?\[([^\[\]]*)\]\([^()\s]*(?:\)|$)/g, "$1")
    .replace(/(?:https?:\/\/|www\.)[^\s)가-힣]*/g, "")
    .replace(/^[ \t]*(?:#{1,6}[ \t]+|>[ \t]?|[-+•·*][ \t]+|(?:[-*_][ \t]*){3,}$)/gm, "")
    .replace(/[*`|\\]|~~|__|(?<![\p{L}\d])_|_(?![\p{L}\d])/gu, "")
    .replace(EMOJI, "")
    .replace(/\^\^|[;:]-?[)(DP]|[ㅋㅎㅠㅜ]+|[ㄱ-ㅎㅏ-ㅣ]{2,}/g, "")
    .replace(/(?<=[^\s([{])[([{]+(?=\S)/g, " ")
    .replace(/[()[\]{}]/g, "")
    .replace(/~(?!\d)/g, "")
    .replace(/[ \t]+(?=[.,!?]|$)/gm, "")
    .replace(/[ \t]{2,}/g, " ")
    .replace(/\n{3,}/g, "\n\n")
    .trimStart();
}

const aloud = (words) => shown(words).replace(SAID, digits).replace(/(?<=\d)~(?=\d)/g, "에서 ");
const numbersIn = (words) => [...new Set(shown(words).match(SAID))];

/** Part a sentence that is too long for one utterance between two words. */
const utterances = (sentence) => aloud(sentence).match(new RegExp(`\\S(?:.{0,${UTTERANCE_CHARACTERS - 2}}\\S)?(?=\\s|$)|\\S+`, "g")) ?? [];

// ---- Words of a recogniser ----
const bare = (words) => words.normalize("NFD").replace(/[\s.,!?…]/g, "");
const grows = (less, more) => less !== "" && bare(more).startsWith(bare(less));

/**
 * Join a recogniser's results, [{words, final}], into what was said.
 * Chrome on desktop adds results, with or without a space between them. Chrome on Android and Safari may give each
 * result all that was said so far, or one that was given before: a result that only grows replaces what it grew from.
 */
function joined(results) {
  const parts = [];
  for (const { words, final } of results) {
    const next = words.trim(), last = parts.at(-1) ?? "";
    if (grows(parts.join(" "), next)) parts.splice(0, parts.length, next);
    else if (grows(last, next)) parts.splice(-1, 1, next);
    else if (next && (final || !grows(next, last))) parts.push(next);
  }
  return parts.join(" ");
}

// ---- The state, and what shows it ----
// A turn's phase. waiting: not sent yet. asked: sent, no text yet. streaming: its text arrives. stopping: the person
// stopped it and the server has not confirmed. done, cut (by a stop) and failed are final.
const OPEN = ["waiting", "asked", "streaming", "stopping"];
let started = false; // the first screen was left
let connection = "disconnected"; // or connecting, connected
let turns = []; // on the page, oldest first
const isOpen = (turn) => OPEN.includes(turn.phase);
/** The turn that the server's next frame belongs to: replies come in the order of their requests. */
const current = () => turns.find((turn) => isOpen(turn) && turn.phase !== "waiting");
/** This tab's turn that the server works on. */
const underWay = () => turns.find(({ phase, foreign }) => !foreign && (phase === "asked" || phase === "streaming"));

function pageState() {
  if (!started) return "";
  if (connection !== "connected") return connection;
  if (listener.phase !== "off") return "listening";
  if (voice.utterance) return "speaking";
  const turn = turns.find(isOpen);
  if (turn && turn.phase !== "stopping") return turn.phase === "streaming" && turn.reply ? "answering" : "thinking";
  return "connected";
}

function showState() {
  const state = pageState();
  const words = state && text(state);
  $("state").dataset.state = state;
  if ($("state").textContent !== words) $("state").textContent = words;
  $("stop").hidden = !(voice.busy || underWay());
  $("microphone").ariaPressed = String(listener.phase !== "off");
  $("speak").textContent = text(listener.phase === "off" ? "speak" : "press");
  $("hint").hidden = !started || turns.length > 0 || !$("hearing").hidden;
  for (const turn of turns) if (turn.phase === "waiting") drawTurn(turn);
}

function setConnection(state) {
  connection = state;
  showState();
}

/** Say one sentence about the page itself, in place of the last; without a name, say none. */
function notice(name = "", sentence = name && text(name)) {
  $("notice").textContent = sentence;
}

const isDemo = () => document.body.dataset.answers === "demo";

/** Who answers, and where words go: the server writes what is so into the body tag. */
function showFacts() {
  const { answers = "gemini", model = "", keepDays: days = "0", noticeUrl = "" } = document.body.dataset;
  const sent = { demo: "sentDemo", gemini: "sentGemini", openai: "sentOpenai" }[answers];
  $("who").textContent = text(isDemo() ? "whoDemo" : "whoModel");
  $("kept").textContent = text(days > 0 ? "keptDays" : "kept", { days });
  $("sent").textContent = [text(sent, { model }), Recognition && text("sentVoice")].filter(Boolean).join(" ");
  $("hint").textContent = text(Recognition ? "hintVoice" : "hintWrite");
  $("operator").hidden = !noticeUrl;
  $("operator").firstChild.href = noticeUrl;
}

/** Follow the newest words, unless the person has scrolled away from them. */
function follow(always = false) {
  const main = document.querySelector("main");
  const low = document.body.classList.contains("low");
  const area = low ? document.scrollingElement : main;
  if (always || follow.atEnd) area.scrollTop = area.scrollHeight;
}
follow.atEnd = true;

function watchScrolling({ target }) {
  const area = target === document ? document.scrollingElement : target;
  follow.atEnd = area.scrollHeight - area.scrollTop - area.clientHeight < 120;
}

function fitScreen() {
  const height = window.visualViewport ? visualViewport.height * visualViewport.scale : innerHeight;
  document.documentElement.style.setProperty("--height", `${height}px`);
  document.body.classList.toggle("low", height < LOW_PIXELS);
  follow();
}

// ---- Turns ----
function addTurn(values) {
  const turn = {
    messages: [], emotion: null, timestamp: 0, spoken: false, // what was asked
    phase: "waiting", reply: "", problem: "", numbers: [], // what became of it; numbers: of helplines in the reply
    foreign: false, // another tab or device asked
    confirmed: false, // the server has read the request
    inRequest: 0, replaced: 0, // messages in the last request, and in the one before it that it replaced
    resent: 0,
    ...values,
  };
  turns.push(turn);
  drawTurn(turn);
  return turn;
}

function makeParts() {
  const [element, mine, theirs] = [make("li", "turn"), make("div", "own"), make("div", "theirs")];
  const [label, words, calls, note] = ["label", "words", "calls", "note row"].map((name) => make("p", name));
  theirs.append(label, words);
  element.append(mine, theirs, calls, note);
  $("turns").append(element);
  return { element, mine, theirs, label, words, calls, note };
}

function drawTurn(turn) {
  turn.parts ??= makeParts();
  drawMine(turn);
  drawReply(turn);
  drawNote(turn);
  follow();
}

function drawMine({ parts: { mine }, messages, emotion }) {
  while (mine.children.length < messages.length) mine.append(ownWords(messages[mine.children.length]));
  while (mine.children.length > messages.length) mine.lastChild.remove();
  mine.querySelector(".badge")?.remove();
  if (mine.firstChild) addBadge(mine.firstChild, emotion);
}

function addBadge(bubble, emotion) {
  if (EMOTIONS[emotion]) bubble.prepend(make("span", "badge", EMOTIONS[emotion]));
}

function ownWords(words) {
  const bubble = make("div", "mine");
  bubble.append(make("p", "words", words));
  if (words.length <= FOLD_CHARACTERS && words.split("\n").length <= FOLD_LINES) return bubble;
  const button = make("button", "", "", { type: "button" });
  button.onclick = () => {
    const folded = bubble.classList.toggle("folded");
    button.ariaExpanded = String(!folded);
    button.textContent = text(folded ? "unfold" : "fold");
  };
  button.onclick();
  bubble.append(button);
  return bubble;
}

function drawReply(turn) {
  const { theirs, label, words, calls } = turn.parts;
  const coming = turn.phase === "asked" || turn.phase === "streaming";
  theirs.hidden = !coming && !turn.reply;
  label.textContent = text(coming ? "generating" : isDemo() ? "replyDemo" : "reply");
  label.classList.toggle("coming", coming);
  words.hidden = !turn.reply;
  words.replaceChildren(...withLinks(shown(turn.reply)));
  const numbers = [...new Set([...turn.numbers, ...numbersIn(turn.reply)])];
  if (numbers.length === turn.numbers.length) return;
  turn.numbers = numbers; // which stay for as long as the turn does
  const link = (scheme, name, number) => make("a", "", text(name, { number }), { href: `${scheme}:${number.replace("-", "")}` });
  const texted = (number) => (number === "109" ? [link("sms", "text", number)] : []);
  calls.replaceChildren(...numbers.flatMap((number) => [link("tel", "call", number), ...texted(number)]));
}

/** Return a reply's words as nodes, in which the numbers of helplines are links. */
function withLinks(words) {
  const parts = words.split(new RegExp(`(${SAID.source})`));
  return parts.map((part, index) => (index % 2 ? make("a", "", part, { href: `tel:${part.replace("-", "")}` }) : part));
}

/** Say beside a turn why no reply, or not all of it, is there, and offer to ask again. */
function drawNote(turn) {
  const { note } = turn.parts;
  const waits = turn.phase === "waiting" && !turn.foreign;
  const isNext = connection === "connected" && turns.find(isOpen) === turn;
  const reason = connection === "connected" ? "waitsTurn" : "waitsConnection";
  const sentence = waits ? (isNext ? "" : text(reason)) : turn.problem;
  note.hidden = !sentence;
  note.classList.toggle("waits", waits);
  if (note.dataset.sentence === sentence) return;
  note.dataset.sentence = sentence;
  note.replaceChildren(make("span", "", sentence));
  if (sentence && !waits && !turn.foreign) note.append(make("button", "again", text("again"), { type: "button", onclick: () => askAgain(turn) }));
}

function removeTurn(turn) {
  turns = turns.filter((other) => other !== turn);
  turn.parts.element.remove();
}

const leaveAfter = (element, ms) => setTimeout(() => element.classList.add("left"), ms);

const storedTurn = ({ user_message: message, ai_response: reply, emotion, timestamp }) =>
  ({ messages: [message], reply, emotion, timestamp, phase: "done" });

/** Show the last stored turns above those that are on the page. */
function showStored(conversations) {
  const onPage = turns;
  const isNew = ({ timestamp }) => !onPage.some((turn) => turn.timestamp === timestamp);
  turns = [];
  conversations.filter(isNew).forEach((stored) => addTurn(storedTurn(stored)));
  $("turns").prepend(...turns.map(({ parts }) => parts.element));
  turns.push(...onPage);
  follow(true);
  showState();
}

// ---- The session, over HTTP ----
let session = null; // {id, token}
let refusedId = ""; // of the last session that the server did not know, or whose token it refused
const path = (name, rest = "") => `/${name}/${encodeURIComponent(session.id)}${rest}`;

/** Ask the server. Without an answer within FETCH_MS the status is 0. */
async function api(method, url) {
  const limit = new AbortController();
  const timer = setTimeout(() => limit.abort(), FETCH_MS);
  const headers = session?.token ? { Authorization: `Bearer ${session.token}` } : {};
  try {
    const answer = await fetch(url, { method, headers, signal: limit.signal });
    const body = answer.status === 204 ? {} : await answer.json();
    return { status: answer.status, ok: answer.ok, body, retryAfter: Number(answer.headers.get("Retry-After")) };
  } catch { // no network, too late, or an answer that is not the server's
    return { status: 0, ok: false, body: { error: text("noServer") } };
  } finally {
    clearTimeout(timer);
  }
}

/** Take up the session of the last visit or of another tab, or make one. Return 0, or the milliseconds to wait. */
async function openSession() {
  const known = memory.get("session");
  if (typeof known?.id === "string" && known.id !== refusedId) {
    session = known;
    return 0;
  }
  const { status, ok, body, retryAfter } = await api("POST", "/api/sessions");
  const problem = ok || !status ? "" : body.error;
  if (problem || openSession.problem) notice("", problem);
  openSession.problem = problem;
  if (ok) keepSession({ id: body.session_id, token: body.token });
  return ok ? 0 : Math.max(1, retryAfter || 0) * 1000;
}

function keepSession(value) {
  session = value;
  memory.set("session", value);
}

function leaveSession() {
  refusedId = session?.id ?? "";
  session = null;
  lastSeq = endedSeq = 0;
}

/** Give up a session that the server refuses, and what the page shows of it if it is gone; the words that wait stay. */
function giveUpSession(name) {
  leaveSession();
  turns.filter((turn) => turn.foreign || (name === "gone" && !isOpen(turn))).forEach(removeTurn);
  for (const turn of turns.filter(isOpen)) turn.phase = "waiting";
  notice(name);
  connecting = null;
  disconnect();
  connect();
}

// ---- The connection ----
let socket = null;
let connecting = null; // the attempt that waits for a session, of which there is one at a time
let attempts = 0; // since the last connection
let retryTimer = 0, pongTimer = 0, resumeTimer = 0;
let pings = 0; // without an answer so far
let pongMs = PONG_MS; // longer where the handshake shows a slow network
let lastSeq = 0; // over all connections: what the server sends again is not shown again
let endedSeq = 0; // the last of a reply that ended, which a reload remembers: the frames of an open reply come again

async function connect() {
  retryTimer = clearTimeout(retryTimer);
  if (socket || connecting || !started) return;
  const mine = (connecting = {});
  const wait = session ? 0 : await openSession();
  if (session && !wait) await Promise.race([checkSession(), new Promise((over) => setTimeout(over, CHECK_MS))]);
  if (mine !== connecting) return;
  connecting = null;
  if (wait) connectLater(wait);
  else openSocket();
}

function openSocket() {
  const query = session.token ? `?token=${encodeURIComponent(session.token)}` : "";
  const opening = new WebSocket(`${location.origin.replace(/^http/, "ws")}${path("ws/session", query)}`);
  const since = performance.now();
  const limit = setTimeout(() => lose(opening), OPENING_MS);
  socket = opening;
  opening.onopen = () => {
    clearTimeout(limit);
    pongMs = Math.max(PONG_MS, 2 * (performance.now() - since));
    if (opening === socket) welcomeBack();
  };
  opening.onmessage = ({ data }) => opening === socket && receive(JSON.parse(data));
  opening.onclose = () => {
    clearTimeout(limit);
    lose(opening);
  };
}

/** Ask whether a session still exists, so that one that was erased is not made anew by its next request. */
async function checkSession() {
  const { id } = session;
  const { status, body } = await api("GET", path("api/sessions", `/conversations?limit=${LAST_TURNS}`));
  if (session?.id !== id) return;
  if (status === 404 || status === 401) giveUpSession(status === 404 ? "gone" : "renewed");
  else if (body.conversations && !turns.some(({ phase }) => phase === "done")) showStored(body.conversations);
}

/** Ask why a handshake was refused: a browser does not tell. The server checks the token before anything else. */
async function checkToken() {
  const { id, token } = session;
  const { status } = await api("GET", path("ws/session", token ? `?token=${encodeURIComponent(token)}` : ""));
  if (status === 401 && session?.id === id) giveUpSession("renewed");
}

function lose(lost) {
  if (lost !== socket) return;
  const opened = connection === "connected";
  disconnect();
  connectLater();
  if (!opened && session && attempts > 1) checkToken();
}

function connectLater(least = 0) {
  disconnect();
  setConnection("disconnected");
  const most = turns.some(isOpen) ? WAITING_PAUSE_MS : MOST_PAUSE_MS;
  const pause = Math.min(FIRST_PAUSE_MS * 2 ** attempts++, most) * (0.75 + Math.random() / 2);
  clearTimeout(retryTimer);
  retryTimer = setTimeout(connect, Math.max(pause, least));
}

function disconnect() {
  resumeTimer = clearTimeout(resumeTimer);
  pongTimer = clearTimeout(pongTimer);
  pings = 0;
  const closing = socket;
  socket = null; // before the close, so that its event starts nothing
  if (connection === "connected") setConnection("disconnected");
  closing?.close();
}

function send(type, data) {
  if (connection !== "connected" || socket?.readyState !== WebSocket.OPEN) return false;
  socket.send(JSON.stringify({ type, data }));
  return true;
}

/** Ask whether the connection still carries anything, and give it up where no answer comes in time. */
function ping(limit = pongMs) {
  if (!send("ping")) return;
  pings += 1;
  const asking = socket;
  pongTimer ||= setTimeout(() => lose(asking), limit);
}

/** Connect now: the phone has woken up, the network is back or the person wants something. */
function hurry() {
  if (socket) return ping();
  attempts = 0;
  connect();
}

// ---- Requests and replies ----
/** Take words of the person: add them to a turn whose reply has not begun, or begin a turn. */
function ask(words, { spoken = false } = {}) {
  voice.stop();
  notice();
  const emotion = $("feeling").value || null;
  if (!$("pin").checked) chooseFeeling("");
  const last = turns.at(-1);
  const gathers = last && !last.foreign && ["waiting", "asked"].includes(last.phase)
    && [...last.messages, words].join("\n").length <= MESSAGE_CHARACTERS;
  const turn = gathers ? last : addTurn({ timestamp: Date.now() });
  const before = underWay();
  if (before && before !== turn) before.muted = true;
  turn.messages.push(words);
  Object.assign(turn, { emotion: emotion ?? turn.emotion, spoken: turn.spoken || spoken, confirmed: false });
  drawTurn(turn);
  follow(true);
  leaveAfter(turn.parts.mine, SAID_MS);
  if (turn.phase === "asked") sendTurn(turn);
  else sendNext();
  savePending();
  if (!socket) hurry();
}

function sendNext() {
  const next = turns.find((turn) => turn.phase === "waiting");
  if (next && !turns.some((turn) => isOpen(turn) && turn.phase !== "waiting" && !turn.foreign)) sendTurn(next);
  showState();
}

/** Send a turn's words, in place of a request of it that may be on its way. */
function sendTurn(turn) {
  if (connection !== "connected") return;
  if (turn.phase === "asked" || turn.phase === "streaming") {
    turn.replaced = turn.inRequest;
    send("cancel_ai_response");
  }
  const { messages, emotion, timestamp } = turn;
  send("request_ai_response", { message: messages.join("\n"), emotion, timestamp });
  Object.assign(turn, { phase: "asked", inRequest: messages.length, problem: "", confirmed: false });
  tell({ asked: { messages, emotion, timestamp } });
  ping();
  expectFrames(turn);
  drawTurn(turn);
  showState();
}

/** Fail a turn of which no frame comes, although the connection works. */
function expectFrames(turn) {
  clearTimeout(expectFrames.timer);
  expectFrames.timer = setTimeout(() => {
    if (turn !== current() || connection !== "connected") return;
    if (turn.foreign) removeTurn(turn);
    else endTurn(turn, "failed", text("lost"));
  }, LOST_MS);
}

/** Be silent at once, and let the server stop too. */
function stop() {
  const turn = underWay();
  voice.stop();
  if (turn) {
    turn.phase = "stopping";
    drawTurn(turn);
    if (!send("cancel_ai_response") && !socket) hurry();
  }
  showState();
}

function askAgain(turn) {
  if (turn.reply) turn.parts.note.querySelector("button").remove();
  else removeTurn(turn);
  const { messages, emotion, spoken } = turn;
  addTurn({ messages, emotion, spoken, timestamp: Date.now() });
  follow(true);
  sendNext();
  if (!socket) hurry();
}

function receive({ type, data, seq, code, interrupted, token, retry_after_ms: retryAfter }) {
  pongTimer = clearTimeout(pongTimer);
  if (token) keepSession({ ...session, token });
  const turn = current();
  if (type === "pong") {
    pings -= 1;
    if (turn && pings <= 0) turn.confirmed = true; // a pong comes after all that was sent before its ping
    return;
  }
  resumeTimer = clearTimeout(resumeTimer);
  if (seq <= lastSeq) return;
  lastSeq = seq ?? lastSeq;
  if (turn) expectFrames(turn);
  if (type === "ai_stream_begin") beginReply(turn ?? addTurn({ foreign: true, phase: "asked" }));
  else if (type === "ai_stream_chunk") continueReply(turn, data.chunk);
  else if (type === "ai_stream_complete") completeReply(turn, interrupted);
  else if (type === "ai_stream_error") failReply(turn, code, data.error, retryAfter);
}

function beginReply(turn) {
  Object.assign(turn, { reply: "", confirmed: true });
  if (turn.phase !== "stopping") turn.phase = "streaming";
  drawTurn(turn);
  showState();
}

function continueReply(turn, chunk) {
  if (!turn || turn.phase === "stopping") return;
  turn.reply += chunk;
  if (isReadAloud(turn)) voice.read(chunk);
  drawTurn(turn);
  showState();
}

function completeReply(turn, interrupted) {
  if (!turn) return;
  if (interrupted && turn.replaced && turn.phase !== "stopping") return endReplaced(turn);
  if (interrupted && turn.foreign && !turn.reply) return removeTurn(turn);
  if (interrupted) endCut(turn);
  else endTurn(turn, "done");
  if (turn.foreign) completeForeign(turn);
}

/**
 * Go on waiting: what ended was an earlier request of a turn, whose later request is still to be answered. If some
 * of its reply had come already, that stays with the words it answers, and the words added since are a turn of their own.
 */
function endReplaced(turn) {
  const { replaced, reply, messages, emotion, timestamp, spoken, inRequest } = turn;
  Object.assign(turn, { replaced: 0, phase: "asked" });
  if (reply && messages.length > replaced) {
    const added = messages.splice(replaced);
    Object.assign(turn, { phase: "done", timestamp: 0 });
    addTurn({ messages: added, emotion, timestamp, spoken, phase: "asked", inRequest: inRequest - replaced });
  }
  voice.stop();
  drawTurn(turn);
}

function failReply(turn, code, sentence, retryAfter) {
  if (!turn) return notice("", sentence);
  if (code === "session_expired" && !turn.renewed) {
    Object.assign(turn, { renewed: true, phase: "waiting" });
    return giveUpSession("gone");
  }
  const words = sentence.replace(/[^.]$/, "$&.");
  const wait = retryAfter ? ` ${text("retryIn", { seconds: Math.ceil(retryAfter / 1000) })}` : "";
  if (/long|invalid|empty/.test(code) && !$("field").value) writeDraft(turn.messages.join("\n"));
  endTurn(turn, "failed", words + wait);
}

const endCut = (turn) => endTurn(turn, "cut", text(turn.reply ? "cut" : "cutBefore"));

function endTurn(turn, phase, problem = "") {
  clearTimeout(expectFrames.timer);
  endedSeq = lastSeq;
  Object.assign(turn, { phase, problem });
  drawTurn(turn);
  if (voice.turn === turn) voice.finish();
  else {
    leaveAfter(turn.parts.theirs, READING_MS + READING_MS_A_CHARACTER * turn.reply.length);
    $("announcer").textContent = problem || aloud(turn.reply); // to a screen reader: once, and whole
  }
  savePending();
  sendNext();
}

/** After a reconnect: send what waits, and find out what has become of the request that was on its way. */
function welcomeBack() {
  attempts = 0;
  setConnection("connected");
  turns.filter((turn) => turn.foreign && isOpen(turn)).forEach(removeTurn);
  const turn = current();
  if (!turn) return sendNext();
  if (turn.phase === "stopping") send("cancel_ai_response");
  else if (!turn.confirmed) return resend(turn);
  resumeTimer = setTimeout(resume, RESUME_MS, turn);
}

/** Nothing came of a request: its reply may be stored, as another process may have it; else ask again. */
async function resume(turn) {
  if (turn.phase === "stopping") return endCut(turn);
  const mine = resumeTimer;
  const { body } = await api("GET", path("api/sessions", "/conversations?limit=10"));
  if (turn !== current() || mine !== resumeTimer) return; // a frame came meanwhile, or the connection was lost again
  const stored = body.conversations?.find(({ timestamp }) => timestamp === turn.timestamp);
  if (!stored) return resend(turn);
  beginReply(turn);
  continueReply(turn, stored.ai_response);
  endTurn(turn, "done");
}

function resend(turn) {
  if (turn.resent >= MOST_RESENT) return endTurn(turn, "failed", text("lost"));
  turn.resent += 1;
  sendTurn(turn);
}

/** Words that have no reply yet survive a reload, in this tab alone. */
function savePending() {
  const kept = turns.filter((turn) => isOpen(turn) && !turn.foreign).map(({ parts, ...turn }) => ({ ...turn, reply: "", numbers: [] }));
  memory.set("pending", kept.length ? { id: session?.id, kept } : null, "sessionStorage");
  memory.set("seq", endedSeq, "sessionStorage");
}

function restorePending() {
  const pending = memory.get("pending", "sessionStorage");
  lastSeq = endedSeq = Number(memory.get("seq", "sessionStorage"));
  if (!Array.isArray(pending?.kept) || (pending.id && pending.id !== memory.get("session")?.id)) return;
  for (const turn of pending.kept) addTurn({ ...turn, phase: turn.phase === "streaming" ? "asked" : turn.phase });
}

// ---- Other tabs of the same browser ----
const channel = window.BroadcastChannel ? new BroadcastChannel("bemore") : null;
const tell = (message) => channel?.postMessage({ id: session?.id, ...message });

function overhear({ data: { id, asked, erased } }) {
  if (!session || id !== session.id) return;
  if (erased) return beginAnew("erasedElsewhere");
  const known = turns.find(({ timestamp }) => timestamp === asked.timestamp);
  if (known) removeTurn(known); // it is asked again
  expectFrames(addTurn({ ...asked, foreign: true, phase: "asked" }));
  showState();
}

/** A reply came that no open turn waited for, perhaps as another device asked: its words are in what is stored. */
async function completeForeign(turn) {
  if (turn.messages.length) return;
  const { body } = await api("GET", path("api/sessions", "/conversations?limit=1"));
  const stored = body.conversations?.[0];
  if (!stored || !turns.includes(turn)) return;
  const known = turns.find(({ timestamp }) => timestamp === stored.timestamp); // given up, or shown before a reload
  if (known) removeTurn(turn);
  Object.assign(known ?? turn, storedTurn(stored), { problem: "" });
  drawTurn(known ?? turn);
}

// ---- Voice out ----
const isReadAloud = (turn) => !turn.foreign && !turn.muted && listener.phase === "off"
  && ($("aloud").value === "always" || ($("aloud").value === "spoken" && turn.spoken));

/** Reads a reply aloud, one utterance a sentence, from the first finished sentence on. */
const voice = {
  busy: false, // there is something to read, or more may come
  turn: null, rest: "", sentences: [], utterance: null, watch: 0, spoke: false, finished: false,

  read(chunk) {
    if (!this.canSpeak()) return;
    Object.assign(this, { busy: true, turn: current(), rest: this.rest + chunk });
    // A full stop ends a sentence where a space follows: not in 3.5, and not where the next chunk may go on with 5.
    for (let end; (end = this.rest.match(/^[^]*?(?:(?:[!?…。！？]|(?<!\d)\.)+["'”’」)]*\s|\n)/)); ) {
      this.sentences.push(...utterances(end[0]));
      this.rest = this.rest.slice(end[0].length);
    }
    this.next();
  },

  finish() {
    if (!this.busy) return;
    this.sentences.push(...utterances(this.rest));
    Object.assign(this, { rest: "", finished: true });
    this.next();
  },

  stop() {
    clearTimeout(this.watch);
    // Before the cancel, so that its events start nothing.
    Object.assign(this, { utterance: null, busy: false, turn: null, rest: "", sentences: [], spoke: false, finished: false });
    window.speechSynthesis?.cancel();
  },

  next() {
    if (this.utterance) return;
    if (this.sentences.length) this.say(this.sentences.shift());
    else if (this.finished) {
      leaveAfter(this.turn.parts.theirs, AFTER_VOICE_MS);
      Object.assign(this, { busy: false, turn: null, spoke: false, finished: false });
    }
    showState();
  },

  say(sentence) {
    clearTimeout(this.watch);
    const utterance = new SpeechSynthesisUtterance(sentence);
    const over = () => {
      if (this.utterance !== utterance) return;
      clearTimeout(this.watch);
      this.utterance = null;
      this.next();
    };
    Object.assign(utterance, { lang: "ko-KR", voice: koreanVoice() ?? null, onend: over });
    utterance.onstart = () => {
      if (this.utterance !== utterance) return;
      this.spoke = true;
      clearTimeout(this.watch);
      this.watch = setTimeout(() => { // some browsers forget the end
        speechSynthesis.cancel();
        over();
      }, 5000 + 400 * sentence.length);
    };
    utterance.onerror = ({ error }) => (error === "interrupted" || error === "canceled" ? over() : this.fail(utterance));
    this.utterance = utterance;
    this.watch = setTimeout(() => this.fail(utterance), NO_VOICE_MS);
    speechSynthesis.speak(utterance);
  },

  fail(utterance) {
    if (this.utterance !== utterance) return;
    this.stop();
    notice("noVoice");
    showState();
  },

  /** Go on after a lock screen or a hidden tab, where browsers pause a voice or end it without a word. */
  wake() {
    if (!this.utterance) return;
    if (speechSynthesis.paused) speechSynthesis.resume();
    else if (!speechSynthesis.speaking) this.say(this.utterance.text);
  },

  canSpeak() {
    const voices = window.speechSynthesis?.getVoices();
    if (voices?.length && !koreanVoice()) notice("noKorean");
    return voices !== undefined && (!voices.length || koreanVoice() !== undefined);
  },
};

const koreanVoice = () => speechSynthesis.getVoices().find(({ lang }) => /^ko\b/.test(lang.replace("_", "-")));

/** Let an iPhone speak later on: it ignores a page's speak() until one ran in a tap. */
function unlockVoice() {
  window.speechSynthesis?.speak(Object.assign(new SpeechSynthesisUtterance(" "), { volume: 0 }));
}

// ---- Voice in ----
const Recognition = window.SpeechRecognition ?? window.webkitSpeechRecognition;
const MICROPHONE_ERRORS = {
  "not-allowed": "micRefused", "service-not-allowed": "micRefused", "audio-capture": "micMissing",
  network: "micNetwork", "language-not-supported": "micFailed", "bad-grammar": "micFailed",
};
// phase: off, listening, or ending (the recogniser was told to end). before: results of recognisers that ended by
// themselves, which browsers do at a pause; now: results of the one that runs.
const listener = { phase: "off", recogniser: null, before: [], now: [], heard: "", problem: "", since: 0, brief: 0, timer: 0 };

function listen() {
  if (listener.phase === "listening") return endListening();
  if (listener.phase === "ending") return;
  if (voice.busy || underWay()?.phase === "streaming") stop();
  notice();
  Object.assign(listener, { phase: "listening", before: [], now: [], heard: "", problem: "", brief: 0 });
  listener.timer = setTimeout(endListening, FIRST_WORDS_MS);
  startRecogniser();
  showState();
}

function startRecogniser() {
  const recogniser = Object.assign(new Recognition(), { lang: "ko-KR", interimResults: true, continuous: true });
  const guarded = (action) => (event) => recogniser === listener.recogniser && action(event);
  const readResult = ({ 0: { transcript }, isFinal }) => ({ words: transcript, final: isFinal });
  recogniser.onresult = guarded(({ results }) => hear(Array.from(results, readResult)));
  recogniser.onerror = guarded(({ error }) => (listener.problem = MICROPHONE_ERRORS[error] ?? ""));
  recogniser.onend = guarded(recogniserEnded);
  Object.assign(listener, { recogniser, since: Date.now() });
  try {
    recogniser.start();
  } catch {
    listener.problem = "micFailed";
    recogniserEnded();
  }
}

function hear(results) {
  listener.now = results;
  const heard = joined([...listener.before, ...listener.now]);
  if (heard === listener.heard) return;
  listener.heard = heard;
  $("hearing").firstChild.textContent = heard;
  $("hearing").hidden = false;
  follow(true);
  showState();
  if (listener.phase !== "listening") return;
  clearTimeout(listener.timer);
  listener.timer = setTimeout(endListening, SILENCE_MS);
}

function recogniserEnded() {
  listener.before.push(...listener.now.map(({ words }) => ({ words, final: true })));
  listener.now = [];
  listener.brief = Date.now() - listener.since < BRIEF_MS ? listener.brief + 1 : 0;
  if (listener.brief > MOST_BRIEF) listener.problem = "micFailed";
  if (document.hidden) stopListening();
  else if (listener.phase === "ending" || listener.problem) sendHeard();
  else startRecogniser();
}

/** Let the recogniser give its last result; one that does not end is left. */
function endListening() {
  clearTimeout(listener.timer);
  listener.phase = "ending";
  listener.timer = setTimeout(sendHeard, ENDING_MS);
  listener.recogniser.stop();
}

function sendHeard() {
  const { heard, problem } = listener;
  leaveListener();
  if (heard) ask(heard, { spoken: true });
  if (problem || !heard) notice(problem || "notHeard");
  if (problem) $("field").focus();
}

/** Stop without sending: what was heard becomes a draft. */
function stopListening() {
  const { heard } = listener;
  leaveListener();
  if (!heard) return;
  writeDraft([$("field").value, heard].filter(Boolean).join(" "));
  notice("heardSoFar");
}

function leaveListener() {
  clearTimeout(listener.timer);
  const { recogniser } = listener;
  Object.assign(listener, { phase: "off", recogniser: null });
  recogniser?.abort?.();
  $("hearing").hidden = true;
  $("hearing").firstChild.textContent = "";
  showState();
}

// ---- Writing ----
function writeDraft(words) {
  $("field").value = words;
  memory.set("draft", words || null, "sessionStorage");
  if (CSS.supports("field-sizing", "content")) return;
  $("field").style.height = "auto";
  $("field").style.height = `${$("field").scrollHeight + 2}px`;
}

function submit(event) {
  event.preventDefault();
  if (listener.phase !== "off") stopListening();
  const words = $("field").value.trim();
  if (!words) return;
  writeDraft("");
  ask(words);
}

/** Enter sends, but not while an input method composes a syllable (Safari tells by the key code alone). */
function typeKey(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) submit(event);
}

function chooseFeeling(emotion) {
  $("feeling").value = emotion;
  $("pin-label").hidden = !emotion;
  if (!emotion) $("pin").checked = false;
}

// ---- Camera ----
async function useCamera(on) {
  const camera = $("camera");
  camera.srcObject?.getTracks().forEach((track) => track.stop());
  camera.srcObject = on ? await navigator.mediaDevices.getUserMedia({ video: { facingMode: "user" } }).catch(() => null) : null;
  camera.hidden = !camera.srcObject;
  document.body.classList.toggle("camera", !camera.hidden);
  $("use-camera").ariaPressed = String(!camera.hidden);
  if (on) $("about-dialog").close();
  if (on && camera.hidden) notice("noCamera");
}

// ---- Conversations of the past ----
const clearPast = () => [...$("past").children].slice(1).forEach((item) => item.remove());

async function openHistory() {
  confirmErasing(false);
  clearPast();
  $("history").showModal();
  await loadPast();
  $("past").scrollTop = $("past").scrollHeight;
}

/** Put a page of turns above those that are there. */
async function loadPast(before = "") {
  const { ok, body } = await pastTurns(PAGE_TURNS, before);
  const page = body.conversations ?? [];
  $("history-note").textContent = ok ? (page.length || before ? "" : text("nothingYet")) : body.error;
  $("past").firstElementChild.after(...page.map(pastElement));
  $("older").hidden = page.length < PAGE_TURNS;
  $("older").dataset.before = page[0]?.id;
}

async function pastTurns(limit, before = "") {
  if (!session) return { ok: false, body: { error: text("noServer") } };
  return api("GET", path("api/sessions", `/conversations?limit=${limit}${before && `&before=${before}`}`));
}

function pastElement({ user_message: mine, ai_response: theirs, emotion, created_at: when }) {
  const item = make("li", "turn");
  item.append(make("time", "", localTime(when), { dateTime: when }), ownWords(mine), make("p", "theirs words"));
  item.lastChild.append(...withLinks(shown(theirs)));
  addBadge(item.children[1], emotion);
  return item;
}

const localTime = (when) => new Date(when).toLocaleString("ko", { dateStyle: "medium", timeStyle: "short" });

/** Save the whole conversation as a text, which says at its top and in its name that an AI wrote the replies. */
async function download() {
  const all = [];
  for (let page, before = ""; !page || page.length; before = page[0]?.id) {
    const { ok, body } = await pastTurns(MOST_TURNS, before);
    if (!ok) return ($("history-note").textContent = body.error);
    page = body.conversations;
    all.unshift(...page);
  }
  const top = text(isDemo() ? "fileTopDemo" : "fileTop", { model: document.body.dataset.model });
  const lines = all.map(({ user_message: mine, ai_response: theirs, created_at: when }) =>
    `[${localTime(when)}]\n${text("me")}: ${mine}\nAI: ${shown(theirs)}\n`);
  const url = URL.createObjectURL(new Blob([[`BeMore\n${top}\n`, ...lines].join("\n")], { type: "text/plain;charset=utf-8" }));
  make("a", "", "", { href: url, download: `${text("file")}-${new Date().toLocaleDateString("sv")}.txt` }).click();
  setTimeout(URL.revokeObjectURL, 60000, url);
}

function confirmErasing(on) {
  $("confirm-erase").hidden = !on;
  if ($("history").open) $(on ? "keep" : "erase").focus();
}

async function eraseAll() {
  if (!session) return ($("history-note").textContent = text("noServer"));
  const { status, body } = await api("DELETE", path("api/sessions"));
  if (status !== 204 && status !== 404) return ($("history-note").textContent = body.error);
  tell({ erased: true });
  memory.set("session", null);
  memory.set("started", null);
  beginAnew("erased");
}

// ---- The first screen ----
/** Return to the first screen with nothing of the conversation left on the page. */
function beginAnew(name) {
  started = false;
  connecting = null;
  retryTimer = clearTimeout(retryTimer);
  leaveSession();
  voice.stop();
  if (listener.phase !== "off") leaveListener();
  disconnect();
  turns.forEach(removeTurn);
  clearPast();
  savePending();
  writeDraft("");
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
  $("first-note").textContent = text(name);
  showScreen();
  $("begin").focus();
}

function begin() {
  started = true;
  memory.set("started", true);
  $("first-note").textContent = "";
  showScreen();
  restorePending();
  setConnection("connecting");
  connect();
}

/** Show the first screen or the conversation; the first screen's text is then one tap away. */
function showScreen() {
  for (const id of ["open-about", "open-history", "talk"]) $(id).hidden = !started;
  $("begin").hidden = started;
  $("first-note").hidden = !$("first-note").textContent;
  if (started) $("about-dialog").querySelector(".bar").after($("about"));
  else $("first-note").after($("about"));
  showState();
  follow(true);
}

// ---- Start ----
const on = (id, type, action) => $(id).addEventListener(type, action);

function listenToThePage() {
  on("begin", "click", () => {
    begin();
    $(Recognition ? "microphone" : "field").focus();
  });
  on("open-about", "click", () => $("about-dialog").showModal());
  on("close-about", "click", () => $("about-dialog").close());
  on("talk", "submit", submit);
  on("field", "keydown", typeKey);
  on("field", "input", () => writeDraft($("field").value));
  on("microphone", "click", listen);
  on("stop", "click", stop);
  on("feeling", "change", () => chooseFeeling($("feeling").value));
  on("aloud", "change", () => {
    memory.set("aloud", $("aloud").value);
    if ($("aloud").value === "never") voice.stop();
    showState();
  });
  on("use-camera", "click", () => useCamera($("camera").hidden));
  on("open-history", "click", openHistory);
  on("close-history", "click", () => $("history").close());
  on("older", "click", () => loadPast($("older").dataset.before));
  on("download", "click", download);
  on("erase", "click", () => confirmErasing(true));
  on("keep", "click", () => confirmErasing(false));
  on("erase-now", "click", eraseAll);
}

function listenToTheBrowser() {
  addEventListener("keydown", ({ key }) => {
    if (key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (listener.phase === "off") stop();
    else stopListening();
  });
  document.addEventListener("visibilitychange", () => {
    savePending();
    if (document.hidden) return;
    hurry();
    voice.wake();
  });
  addEventListener("pagehide", savePending);
  addEventListener("online", hurry);
  addEventListener("offline", () => started && connectLater());
  addEventListener("click", unlockVoice, { once: true, capture: true });
  addEventListener("keydown", unlockVoice, { once: true, capture: true });
  document.addEventListener("scroll", watchScrolling, { passive: true });
  document.querySelector("main").addEventListener("scroll", watchScrolling, { passive: true });
  (window.visualViewport ?? window).addEventListener("resize", fitScreen);
  channel?.addEventListener("message", overhear);
  setInterval(() => ping(IDLE_PONG_MS), PING_MS);
}

for (const [value, name] of [["", text("none")], ...Object.entries(EMOTIONS)]) $("feeling").append(make("option", "", name, { value }));
for (const dialog of document.querySelectorAll("dialog")) dialog.append(document.querySelector(".care").cloneNode(true));
$("microphone").hidden = !Recognition;
$("camera-setting").hidden = !navigator.mediaDevices; // browsers give neither camera nor microphone over plain HTTP
$("aloud").parentElement.hidden = !window.speechSynthesis;
$("aloud").value = ["spoken", "always", "never"].find((choice) => choice === memory.get("aloud")) ?? "spoken";
listenToThePage();
listenToTheBrowser();
showFacts();
fitScreen();
showScreen();
writeDraft(memory.get("draft", "sessionStorage") ?? "");
if (memory.get("started")) begin();
