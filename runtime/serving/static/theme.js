// Before the first paint: the theme that was chosen in this tab, where it is not the system's.
(() => {
  const chosen = sessionStorage.getItem("theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
