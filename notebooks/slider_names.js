// ipywidgets leaves a slider's handle without a name; a screen reader should say its label.
new MutationObserver(() => {
  for (const slider of document.querySelectorAll(".widget-slider")) {
    const label = slider.querySelector(".widget-label")
    const handle = slider.querySelector(".noUi-handle")
    if (label && handle) handle.setAttribute("aria-label", label.textContent)
  }
}).observe(document.body, {childList: true, subtree: true})
