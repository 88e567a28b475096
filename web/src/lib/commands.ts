/** Everything that can be done by name: the palette's list, and the question field's "/" commands. */
import { app } from './app.svelte';
import { copyText } from './copy';
import { exportConversation } from './exchange';
import { LANGUAGES, t, type Language } from './i18n.svelte';
import { library } from './library.svelte';
import { notices } from './notices.svelte';
import { personas } from './personas.svelte';
import { session } from './session.svelte';
import { talk } from './talk.svelte';

export interface Command {
  group: string;
  label: string;
  run: () => void;
  /** Its name after "/" in the question field. */
  slash?: string;
}

/** Returns what can be done now. */
export function commands(): Command[] {
  const group = t('actions');
  const here = talk.current;
  const last = talk.last;
  const isAnswer = last !== undefined && !talk.isWriting && last.record.role === 'assistant';
  const all: (Command | false)[] = [
    { group, label: t('newChat'), slash: 'new', run: () => talk.fresh() },
    { group, label: t('temporaryChat'), slash: 'temporary', run: () => { talk.fresh(); talk.isTemporary = true; } },
    session.models.length > 1 && { group, label: t('compare'), slash: 'compare', run: () => { notices.layer = 'compare'; } },
    talk.isWriting && { group, label: t('stop'), run: () => void talk.stop() },
    isAnswer && { group, label: t('regenerate'), slash: 'regenerate', run: () => void talk.regenerate(last) },
    isAnswer && last.isCut && { group, label: t('continue'), slash: 'continue', run: () => void talk.goOn(last) },
    last !== undefined && { group, label: t('copyAnswer'), slash: 'copy', run: () => void copyText(last.live.text) },
    last !== undefined && !talk.isWriting && { group, label: t('editLast'), run: () => talk.editLast() },
    isAnswer && { group, label: t('withSummary'), slash: 'summary', run: () => void talk.sumUp() },
    isAnswer && { group, label: t('branchOff'), run: () => void talk.branchOff(last.record) },
    here !== null && !talk.isTemporary && {
      group, label: here.pinned ? t('unpin') : t('pin'), run: () => void talk.change({ pinned: !here.pinned }),
    },
    here !== null && { group, label: t('rename'), slash: 'rename', run: () => { talk.isRenaming = true; } },
    here !== null && !talk.isTemporary && { group, label: t('moveTo'), run: () => library.file([here.id]) },
    here !== null && { group, label: t('exportMarkdown'), slash: 'export', run: () => void exportConversation(here.id, 'markdown') },
    here !== null && { group, label: t('exportJson'), run: () => void exportConversation(here.id, 'json') },
    here !== null && { group, label: t('print'), slash: 'print', run: () => void talk.all().then(() => window.print()) },
    here !== null && { group, label: t('delete'), run: () => void app.delete([here]) },
    { group, label: t('addFiles'), slash: 'files', run: () => document.getElementById('files')?.click() },
    library.conversations.length > 0 && { group, label: t('pickSeveral'), run: () => { notices.isSidebarOpen = true; library.picked = new Set(); } },
    { group, label: t('settings'), slash: 'settings', run: () => notices.openSettings() },
    ...(['usage', 'personas', 'prompts', 'data', 'accounts'] as const).map((part) => ({
      group, label: t(part === 'data' ? 'yourData' : part), ...(part === 'usage' ? { slash: part } : {}), run: () => notices.openSettings(part),
    })),
    { group, label: t('shortcuts'), slash: 'shortcuts', run: () => { notices.layer = 'shortcuts'; } },
    { group, label: t(notices.isSidebarOpen ? 'hideSidebar' : 'showSidebar'), run: () => { notices.isSidebarOpen = !notices.isSidebarOpen; } },
    session.person.name !== '' && { group, label: t('signOut'), run: () => void app.signOut() },
    ...(['system', 'light', 'dark'] as const).map((theme) => ({
      group, label: `${t('appearance')}: ${t(theme)}`, run: () => void session.set({ theme }),
    })),
    ...Object.entries(LANGUAGES).map(([tag, name]) => ({
      group: t('language'), label: name, run: () => void session.set({ language: tag as Language }),
    })),
    ...session.models
      .filter((model) => !model.fault)
      .map((model) => ({ group: t('model'), label: model.id, run: () => void talk.choose(model.id) })),
    ...personas.all.map((persona) => ({ group: t('personas'), label: persona.name, run: () => void talk.become(persona) })),
    ...(session.settings.prompts ?? []).map((prompt) => ({
      group: t('prompts'), label: `/${prompt.name}`, run: () => talk.saveDraft(prompt.text),
    })),
  ];
  return all.filter((command) => command !== false);
}
