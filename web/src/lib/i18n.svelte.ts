/** Words in five languages. English is always there; the others come when they are chosen. */
import en from '../locales/en.json';

export type Key = keyof typeof en;
export type Language = 'en' | 'fr' | 'de' | 'es' | 'it';
type Values = Record<string, string | number>;

export const LANGUAGES: Record<Language, string> = {
  en: 'English',
  fr: 'Français',
  de: 'Deutsch',
  es: 'Español',
  it: 'Italiano',
};

const loaders: Record<Exclude<Language, 'en'>, () => Promise<{ default: Record<Key, string> }>> = {
  fr: () => import('../locales/fr.json'),
  de: () => import('../locales/de.json'),
  es: () => import('../locales/es.json'),
  it: () => import('../locales/it.json'),
};

let language = $state<Language>('en');
let words = $state.raw<Record<Key, string>>(en);
let plurals = new Intl.PluralRules('en');
/** By language and options: making one takes far longer than using it. */
const formats = new Map<string, Intl.NumberFormat>();

export function isLanguage(value: unknown): value is Language {
  return typeof value === 'string' && value in LANGUAGES;
}

export function browserLanguage(): Language {
  for (const tag of navigator.languages) {
    const short = tag.slice(0, 2).toLowerCase();
    if (isLanguage(short)) return short;
  }
  return 'en';
}

export async function speak(next: Language): Promise<void> {
  words = next === 'en' ? en : (await loaders[next]()).default;
  language = next;
  plurals = new Intl.PluralRules(next);
  document.documentElement.lang = next;
}

export function spoken(): Language {
  return language;
}

/** Returns the text for a key; `{n}` is replaced by `values.n`, and "one | many" chosen by it. */
export function t(key: Key, values: Values = {}): string {
  let text: string = words[key] ?? en[key];
  if (typeof values['n'] === 'number' && text.includes(' | ')) {
    const [one = '', many = one] = text.split(' | ');
    text = plurals.select(values['n']) === 'one' ? one : many;
  }
  return text.replace(/\{(\w+)\}/g, (whole, name: string) => {
    const value = values[name];
    return value === undefined ? whole : typeof value === 'number' ? number(value) : value;
  });
}

export function number(value: number, digits = 0): string {
  return formatted(value, { maximumFractionDigits: digits, minimumFractionDigits: digits });
}

function formatted(value: number, options: Intl.NumberFormatOptions): string {
  const key = `${language} ${Object.entries(options).join(' ')}`;
  let format = formats.get(key);
  if (!format) formats.set(key, (format = new Intl.NumberFormat(language, options)));
  return format.format(value);
}

/** 6100 becomes 6.1k. */
export function short(value: number): string {
  if (value < 1000) return number(value);
  const thousands = value / 1000;
  return `${number(thousands, thousands < 100 && Math.round(thousands * 10) % 10 !== 0 ? 1 : 0)}k`;
}

/** Small sums keep two digits that matter. */
export function money(value: number, currency: string): string {
  const digits = value !== 0 && Math.abs(value) < 0.1 ? { maximumSignificantDigits: 2 } : { maximumFractionDigits: 2 };
  return formatted(value, { style: 'currency', currency, ...digits });
}

export function day(seconds: number): string {
  return new Intl.DateTimeFormat(language, { dateStyle: 'medium' }).format(new Date(seconds * 1000));
}
