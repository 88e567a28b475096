/** Character references in Markdown text, as the characters they stand for. */
const NAMED: Record<string, string> = {
  amp: '&', lt: '<', gt: '>', quot: '"', apos: "'", nbsp: '\u00a0', copy: '©', reg: '®', trade: '™', deg: '°',
  hellip: '…', mdash: '—', ndash: '–', lsquo: '‘', rsquo: '’', ldquo: '“', rdquo: '”', laquo: '«', raquo: '»',
  bull: '•', middot: '·', times: '×', divide: '÷', plusmn: '±', ne: '≠', le: '≤', ge: '≥', approx: '≈',
  larr: '←', rarr: '→', uarr: '↑', darr: '↓', harr: '↔', rArr: '⇒', infin: '∞', sum: '∑', radic: '√', pi: 'π',
  alpha: 'α', beta: 'β', gamma: 'γ', delta: 'δ', lambda: 'λ', mu: 'μ', sigma: 'σ', omega: 'ω', euro: '€',
  pound: '£', yen: '¥', sect: '§', para: '¶', eacute: 'é', egrave: 'è', agrave: 'à', ccedil: 'ç', uuml: 'ü',
  ouml: 'ö', auml: 'ä', szlig: 'ß', ntilde: 'ñ', check: '✓',
};

export function decoded(text: string): string {
  if (!text.includes('&')) return text;
  return text.replace(/&(?:#(\d{1,7})|#[xX]([\da-fA-F]{1,6})|([A-Za-z]{2,8}));/g, (whole, decimal, hex, name) => {
    if (name !== undefined) return NAMED[name as string] ?? whole;
    const code = decimal !== undefined ? Number(decimal) : Number.parseInt(hex as string, 16);
    const isBad = code === 0 || code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff);
    return isBad ? '\ufffd' : String.fromCodePoint(code);
  });
}

/** Returns the address of a link when it may be followed: http, https and mailto; else null. */
export function safeAddress(href: string): string | null {
  const address = decoded(href).trim();
  // Control characters inside a scheme are skipped by browsers: such an address is not followed at all.
  if (/[\u0000-\u0020\u007f]/.test(address)) return null;
  return /^(?:https?:\/\/|mailto:)/i.test(address) ? address : null;
}
