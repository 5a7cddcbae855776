// The elements of the page by their ids.

export const element = (id) => document.getElementById(id);

// Show or hide elements: {id: whether it is visible}.
export function show(visible) {
  for (const [id, isVisible] of Object.entries(visible)) element(id).hidden = !isVisible;
}
