// A page that is opened from a folder may not read the search index.
if (location.protocol === 'file:')
  for (const input of document.querySelectorAll('.md-search__input')) {
    input.placeholder = 'make docs-serve';
    input.disabled = true;
  }
