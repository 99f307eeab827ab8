// The peer in Node: what a good developer would write with ws, Google's own client and better-sqlite3.
//
//     PORT=8001 GEMINI_BASE_URL=http://127.0.0.1:9000/... SYSTEM_PROMPT=... node bench/peer_node/peer.js
//
// It speaks the same protocol and does the same work on the same tables as bench/peer.py: a token, the last ten turns,
// a streamed reply, one insert, then the completion. It has no resume, no pacing, no limits, no care.

import { readFileSync } from "node:fs";
import { GoogleGenAI, ThinkingLevel } from "@google/genai";
import Database from "better-sqlite3";
import { WebSocketServer } from "ws";

const BUCKET_MS = 60_000, PER_MINUTE = 6000;
const MAX_MESSAGE_CHARACTERS = 2_000;

const database = new Database("peer.db");
database.exec(readFileSync(new URL("../peer.sql", import.meta.url), "utf8"));
const createSession = database.prepare("INSERT INTO sessions (session_id) VALUES (?) ON CONFLICT DO NOTHING");
const takeToken = database.prepare(`
  UPDATE sessions SET full_at = max(full_at, :now) + :refill
  WHERE session_id = :id AND max(full_at, :now) + :refill <= :now + :bucket`);
const history = database.prepare(
  "SELECT user_message, ai_response FROM conversations WHERE session_id = ? ORDER BY id DESC LIMIT 10");
const addTurn = database.prepare(
  "INSERT INTO conversations (session_id, user_message, ai_response, emotion, timestamp) VALUES (?, ?, ?, ?, ?)");

const httpOptions = { baseUrl: process.env.GEMINI_BASE_URL, apiVersion: "v1beta" };
const { models } = new GoogleGenAI({ apiKey: "bench", httpOptions });

const turn = (role, text) => ({ role, parts: [{ text }] });

async function answer(socket, sessionId, data) {
  const send = (type, fields = {}) => socket.send(JSON.stringify({ type, data: fields, seq: Date.now() * 1000 }));
  const message = data.message.trim(), now = Date.now();
  const bucket = { id: sessionId, now, refill: BUCKET_MS / PER_MINUTE, bucket: BUCKET_MS };
  if (message.length < 1 || message.length > MAX_MESSAGE_CHARACTERS || !takeToken.run(bucket).changes) {
    send("ai_stream_error", { error: "요청을 처리할 수 없습니다" });
    return;
  }
  const contents = history.all(sessionId).reverse().flatMap(
    (said) => [turn("user", said.user_message), turn("model", said.ai_response)]);
  contents.push(turn("user", message));
  const stream = await models.generateContentStream({
    model: "gemini-3.5-flash-lite",
    contents,
    config: {
      systemInstruction: process.env.SYSTEM_PROMPT,
      maxOutputTokens: 200,
      thinkingConfig: { thinkingLevel: ThinkingLevel.MINIMAL },
    },
  });
  const said = [];
  for await (const event of stream) {
    if (event.text) {
      if (!said.length) send("ai_stream_begin");
      said.push(event.text);
      send("ai_stream_chunk", { chunk: event.text });
    }
  }
  addTurn.run(sessionId, message, said.join(""), data.emotion ?? null, now);
  send("ai_stream_complete");
}

const server = new WebSocketServer({ host: "127.0.0.1", port: Number(process.env.PORT), perMessageDeflate: false });
server.on("connection", (socket, request) => {
  const sessionId = decodeURIComponent(request.url.split("/").pop());
  createSession.run(sessionId);
  socket.on("message", (text) => {
    const frame = JSON.parse(text);
    if (frame.type === "request_ai_response") answer(socket, sessionId, frame.data);
  });
});
