// The frames of /ws/session/{session_id}. docs/protocol.md says what they mean.

export type Emotion =
  | "happy" | "sad" | "angry" | "anxious" | "neutral" | "surprised" | "disgusted" | "fearful";

export type ErrorCode =
  | "empty_message" | "message_too_long" | "invalid_request" | "rate_limited" | "session_expired" | "ai_unavailable";

export type ClientFrame =
  | { type: "request_ai_response"; data: { message: string; emotion?: Emotion | null; timestamp?: number } }
  | { type: "cancel_ai_response" }
  | { type: "ping" }
  | { type: "status_update"; data?: unknown };

export type ServerFrame =
  | { type: "ai_stream_begin"; data: Record<string, never>; seq: number }
  | { type: "ai_stream_chunk"; data: { chunk: string }; seq: number }
  | { type: "ai_stream_complete"; data: Record<string, never>; seq: number; interrupted?: true }
  | { type: "ai_stream_error"; data: { error: string }; code: ErrorCode; retry_after_ms?: number; seq?: number }
  | { type: "pong"; data: { timestamp: number }; token?: string };

/** One stored turn, as GET /api/sessions/{session_id}/conversations returns it. */
export interface StoredTurn {
  id: number;
  session_id: string;
  user_message: string;
  ai_response: string;
  emotion: Emotion | null;
  timestamp: number;
  created_at: string;
}

/** Return whether a frame is new; call it once for each frame, and ignore the frame otherwise. */
export function makeFilter(): (frame: ServerFrame) => boolean {
  let seen = 0;
  return (frame) => {
    const seq = "seq" in frame ? frame.seq : undefined;
    const isNew = seq === undefined || seq > seen;
    if (seq !== undefined && isNew) seen = seq;
    return isNew;
  };
}
