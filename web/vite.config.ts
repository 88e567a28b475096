import { svelte } from '@sveltejs/vite-plugin-svelte';
import { defineConfig, type Plugin } from 'vite';

/** KaTeX names each font three times; every browser that runs this page reads the first, woff2. */
const woff2Only: Plugin = {
  name: 'woff2-only',
  enforce: 'pre',
  transform(code, id) {
    if (!id.endsWith('katex.min.css')) return null;
    return { code: code.replace(/,url\([^)]*\.(?:woff|ttf)\) format\("[^"]*"\)/g, ''), map: null };
  },
};

export default defineConfig({
  plugins: [svelte(), woff2Only],
  base: '/',
  build: {
    outDir: '../src/bise/server/static',
    emptyOutDir: true,
    assetsInlineLimit: 0, // the page's policy allows data: for images only
    modulePreload: { polyfill: false },
    target: 'es2022',
  },
  server: { proxy: { '/api': 'http://127.0.0.1:8000', '/v1': 'http://127.0.0.1:8000' } },
});
