/** Shows a dialog before all else; once it is gone, whoever had the focus before has it again. */
export function modal(dialog: HTMLDialogElement): () => void {
  const before = document.activeElement;
  dialog.showModal();
  return () => {
    // Whatever closed it may have moved the focus on purpose; only where it was lost is it given back.
    const isLost = document.activeElement === null || document.activeElement === document.body;
    if (isLost && before instanceof HTMLElement && before.isConnected) before.focus();
  };
}
