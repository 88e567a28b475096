/** KaTeX, loaded with the first formula. Its output is the only HTML that the page ever inserts. */
import katex from 'katex';
import 'katex/dist/katex.min.css';

/** Returns a formula as HTML and MathML; null when KaTeX cannot read it. */
export function typeset(text: string, display: boolean): string | null {
  try {
    return katex.renderToString(text, {
      displayMode: display,
      output: 'htmlAndMathml',
      throwOnError: true,
      trust: false,
      strict: 'ignore',
      maxExpand: 200,
      maxSize: 20,
    });
  } catch {
    return null;
  }
}
