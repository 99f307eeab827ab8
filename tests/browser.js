// What a browser's vendor provides, held in a test's hand: window.mouth for speech synthesis, window.ear for recognition.
"use strict";

window.mouth = {
  spoken: [], // every utterance's text
  current: null,
  voices: [{ lang: "ko-KR", name: "test" }],
  locked: false, // an iPhone: nothing is spoken until speak() was called in a tap
  mute: false, // a voice of which no event comes
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
    paused: false,
    get speaking() {
      return mouth.current !== null;
    },
    getVoices: () => mouth.voices,
    speak(utterance) {
      if (["click", "keydown"].includes(window.event?.type) && window.event.isTrusted) mouth.locked = false;
      if (mouth.locked || utterance.volume === 0) return;
      mouth.spoken.push(utterance.text);
      if (mouth.mute) return;
      mouth.current = utterance;
      mouth.language = utterance.lang;
      queueMicrotask(() => mouth.current === utterance && utterance.onstart());
    },
    cancel() {
      const utterance = mouth.current;
      mouth.current = null;
      if (utterance) queueMicrotask(() => utterance.onerror({ error: "interrupted" }));
    },
    resume() {
      this.paused = false;
    },
  },
});

window.ears = []; // every recogniser that was started
window.startRecognition = () => {}; // a test may let it throw
window.webkitSpeechRecognition = class {
  constructor() {
    this.given = []; // results so far
  }
  start() {
    startRecognition();
    ears.push((window.ear = this));
  }
  stop() {
    this.stopped = true;
    this.end();
  }
  abort() {
    this.aborted = true;
  }
  end() {
    this.onend();
  }
  /** Give the whole list of results, as [words, isFinal]. */
  give(...results) {
    this.onresult({ results: results.map(([transcript, isFinal = false]) => Object.assign([{ transcript }], { isFinal })) });
  }
  /** As Chrome on desktop: the last result changes until it is final, and the next is added to it. */
  hear(words, isFinal = false) {
    if (!this.given.length || this.given.at(-1)[1]) this.given.push(["", false]);
    this.given[this.given.length - 1] = [words, isFinal];
    this.give(...this.given);
  }
  fail(error) {
    this.onerror({ error });
    this.onend();
  }
};
window.SpeechRecognition = undefined;
