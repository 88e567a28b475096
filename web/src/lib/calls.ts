/** Words that begin with a sign and call for something. Pure, so that it can be tested. */
export type Sign = '/' | '@' | '#';

export interface Call {
  sign: Sign;
  /** What follows the sign, in small letters. */
  text: string;
  /** Where the word begins and ends in the text. */
  start: number;
  end: number;
}

/** Returns the call that the caret stands in; "/" counts at the very beginning only, so that paths stay text. */
export function callAt(text: string, caret: number): Call | null {
  const before = text.slice(0, caret);
  const found = /(?:^|\s)([@#])([^\s@#]{0,60})$/.exec(before) ?? /^(\/)(\S{0,60})$/.exec(before);
  if (!found) return null;
  const [, sign, word] = found as unknown as [string, Sign, string];
  return { sign, text: word.toLowerCase(), start: caret - word.length - 1, end: caret };
}

/** Returns the entries that contain the letters of `text`, those that begin with it first. */
export function find<T extends { label: string }>(entries: readonly T[], text: string): T[] {
  const at = (entry: T): number => entry.label.slice(1).toLowerCase().indexOf(text);
  return entries.filter((entry) => at(entry) >= 0).sort((a, b) => Number(at(a) > 0) - Number(at(b) > 0));
}
