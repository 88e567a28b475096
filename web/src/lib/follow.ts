/**
 * Keeps a growing transcript at its end while its reader is there. Any upward move lets go; coming back to the end
 * takes hold again.
 */
const NEAR = 48;

export class Follow {
  isPinned = true;
  #lastWrite = -1;
  #lastTop = 0;

  constructor(
    private readonly area: HTMLElement,
    private readonly changed: (isPinned: boolean) => void,
  ) {
    area.addEventListener('scroll', this.#scrolled, { passive: true });
  }

  close(): void {
    this.area.removeEventListener('scroll', this.#scrolled);
  }

  /** Goes to the end and stays there. */
  pin(): void {
    this.#set(true);
    this.toEnd();
  }

  /** Goes to the end if the reader is there. */
  grown(): void {
    if (this.isPinned) this.toEnd();
  }

  toEnd(): void {
    this.area.scrollTop = this.area.scrollHeight;
    this.#lastWrite = this.area.scrollTop;
    this.#lastTop = this.#lastWrite;
  }

  #scrolled = (): void => {
    const top = this.area.scrollTop;
    const isOurs = Math.abs(top - this.#lastWrite) < 2;
    const isUp = top < this.#lastTop - 1;
    const left = this.area.scrollHeight - top - this.area.clientHeight;
    this.#lastTop = top;
    if (isOurs) return;
    if (isUp && left > 4) this.#set(false);
    else if (left < NEAR) this.#set(true);
  };

  #set(isPinned: boolean): void {
    if (isPinned === this.isPinned) return;
    this.isPinned = isPinned;
    this.changed(isPinned);
  }
}
