// What a browser's vendor provides, held in a test's hand: window.mouth for speech synthesis, window.ear for recognition.
"use strict";

window.mouth = {
  spoken: [], // every utterance's text
  cancelled: 0,
  current: null,
  voices: [{ lang: "ko-KR", name: "test" }],
  end() {
    const utterance = this.current;
    this.current = null;
    utterance.onend();
  },
};
window.SpeechSynthesisUtterance = class {
  constructor(text) {
    this.text = text;
  }
};
Object.defineProperty(window, "speechSynthesis", {
  value: {
    getVoices: () => mouth.voices,
    speak(utterance) {
      mouth.spoken.push(utterance.text);
      mouth.current = utterance;
      mouth.language = utterance.lang;
      queueMicrotask(() => mouth.current === utterance && utterance.onstart());
    },
    cancel() {
      mouth.cancelled += 1;
      const utterance = mouth.current;
      mouth.current = null;
      if (utterance) queueMicrotask(() => utterance.onerror({ error: "interrupted" }));
    },
  },
});

window.webkitSpeechRecognition = class {
  start() {
    window.ear = this;
  }
  stop() {
    this.onend();
  }
  hear(words, isFinal = false) {
    this.onresult({ results: [Object.assign([{ transcript: words }], { isFinal })] });
    if (isFinal) this.onend();
  }
  fail(error) {
    this.onerror({ error });
    this.onend();
  }
};
window.SpeechRecognition = undefined;
