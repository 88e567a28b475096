/** One redraw per frame, however many tokens arrive; fewer when redrawing is slow or nobody looks. */
const SLOW_MS = 8;
const SLOW_WAIT_MS = 33;
const HIDDEN_WAIT_MS = 250;

export class Flusher {
  #isPlanned = false;
  #last = 0;

  constructor(private readonly draw: () => void) {}

  plan(): void {
    if (this.#isPlanned) return;
    this.#isPlanned = true;
    if (document.hidden) setTimeout(this.#run, HIDDEN_WAIT_MS);
    else if (this.#last > SLOW_MS) setTimeout(() => requestAnimationFrame(this.#run), SLOW_WAIT_MS);
    else requestAnimationFrame(this.#run);
  }

  #run = (): void => {
    this.#isPlanned = false;
    const start = performance.now();
    this.draw();
    this.#last = performance.now() - start;
  };
}
