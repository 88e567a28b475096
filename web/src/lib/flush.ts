/** One redraw per frame, however many tokens arrive; fewer where drawing is slow or nobody looks. */

/** The part of the page's time that drawing may take. */
const SHARE = 0.2;
const LONGEST_WAIT_MS = 200;
const HIDDEN_WAIT_MS = 250;

export class Flusher {
  #isPlanned = false;
  /** When the next redraw may begin. */
  #free = 0;

  constructor(private readonly draw: () => void) {}

  plan(): void {
    if (this.#isPlanned) return;
    this.#isPlanned = true;
    const wait = this.#free - performance.now();
    if (document.hidden) setTimeout(this.#run, HIDDEN_WAIT_MS);
    else if (wait > 0) setTimeout(() => requestAnimationFrame(this.#run), wait);
    else requestAnimationFrame(this.#run);
  }

  #run = (): void => {
    this.#isPlanned = false;
    const start = performance.now();
    this.draw();
    onceDrawn(() => {
      const cost = performance.now() - start;
      this.#free = start + Math.min(LONGEST_WAIT_MS, cost / SHARE);
    });
  };
}

/** Runs `work` after the layout and the paint that this frame asks for: a message is read behind them. */
function onceDrawn(work: () => void): void {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = () => {
    port1.close();
    work();
  };
  port2.postMessage(null);
}
