'use strict';
// All that comes from the server is set as text or as the address of a picture by its number; nothing is read as HTML.

const $ = id => document.getElementById(id);
let about = {}, hits = [], said = '', shown = null, asking = 0;

function element(name, properties = {}, ...inside) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...inside);
  return made;
}

const score = value => value.toFixed(3);

async function ask(path, options) {
  let reply;
  try { reply = await fetch(path, options); }
  catch { throw new Error('The server does not answer: it has been ended.'); }
  const found = await reply.json();
  if (!reply.ok) throw new Error(found.error);
  return found;
}

const question = text => ({method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify({text})});

function tell(text, fault = false) {
  $('status').textContent = text;
  $('status').classList.toggle('fault', fault);
}

// ------------------------------------------------------------------ a query and its hits

async function search(what, path, options) {
  const own = ++asking;
  tell('Searching …');
  try {
    const found = await ask(path, options);
    if (own !== asking) return;  // another query has begun meanwhile
    hits = found.hits;
    $('asked').hidden = !found.shown;
    if (found.shown) $('asked-picture').src = found.shown;
    list($('asked-texts'), found.texts);
    range();
    draw(what);
  } catch (fault) {
    if (own === asking) tell(fault.message, true);
  }
}

function range() {
  const slider = $('least'), scores = hits.map(hit => hit.score);
  $('sift').hidden = hits.length < 2;
  // a little outside of the scores, so that rounding hides none of them
  slider.min = Math.min(...scores) - 1e-6; slider.max = Math.max(...scores); slider.step = 'any';
  slider.value = slider.min;
}

function sift() {
  const least = Number($('least').value), items = $('hits').children;
  let kept = 0;
  hits.forEach((hit, n) => { items[n].hidden = hit.score < least; kept += hit.score >= least; });
  $('least-told').textContent = `${score(least)}: ${kept} of ${hits.length}`;
}

function draw(what) {
  $('hits').replaceChildren(...hits.map(card));
  sift();
  tell(`${hits.length} ${hits.length === 1 ? 'picture' : 'pictures'} nearest to ${what}.`);
}

function card(hit, n) {
  const name = hit.caption || hit.key;
  const inside = about.shown
    ? element('img', {src: `/small/${hit.row}`, alt: name, loading: 'lazy', onerror() { this.replaceWith(none()); }})
    : none();
  const open = element('button', {className: 'open', type: 'button', onclick: () => look(hit)}, inside);
  open.setAttribute('aria-label', `Open ${name}`);
  const like = element('button', {type: 'button', textContent: 'More like this', onclick: () => more(hit)});
  like.setAttribute('aria-label', `More like ${name}`);
  return element('li', {}, open, element('div', {className: 'told'},
    element('span', {className: 'number', textContent: `${n + 1}.  ${score(hit.score)}`}),
    element('span', {className: 'caption', textContent: name}), like));
}

const none = () => element('span', {className: 'none', textContent: 'no picture'});

function more(hit) {
  $('one').close();
  $('words').value = said = '';
  scrollTo(0, 0);
  $('words').focus({preventScroll: true});
  search(`“${hit.caption || hit.key}”`, `/like/${hit.row}`);
}

function picture(file) {
  if (!file) return;
  $('words').value = said = '';
  search(file.name || 'the picture', '/picture', {method: 'POST', headers: {'Content-Type': 'application/octet-stream'}, body: file});
}

// ------------------------------------------------------------------ one hit

async function look(hit) {
  shown = hit;
  $('one-title').textContent = hit.key;
  $('one-caption').textContent = hit.caption || '';
  $('one-score').textContent = `Score ${score(hit.score)}`;
  $('one-file').textContent = hit.file || '';
  $('one-picture').hidden = !about.shown;
  if (about.shown) $('one-picture').src = `/large/${hit.row}`;
  $('one-picture').alt = hit.caption || hit.key;
  $('look').hidden = !about.looks;
  $('look-words').value = said;
  $('look-told').textContent = '';
  $('look-found').replaceChildren();
  $('one-texts').hidden = true;
  $('one').showModal();
  if (about.texts) {
    try {
      const found = await ask(`/texts/${hit.row}`);
      if (shown === hit) list($('one-texts'), found.texts);
    } catch (fault) { $('look-told').textContent = fault.message; }
  }
}

async function attend(event) {
  event.preventDefault();
  const hit = shown;
  $('look-told').textContent = 'Looking …';
  try {
    const found = await ask(`/look/${hit.row}`, question($('look-words').value));
    if (shown !== hit) return;
    $('one-picture').src = found.picture;
    $('one-picture').alt = `Where “${$('look-words').value}” looks in ${hit.key}`;
    $('look-found').replaceChildren(...found.words.flatMap(({word, weight}) => {
      const made = element('span', {textContent: word, title: weight.toFixed(2)});
      made.style.setProperty('--w', weight);
      return [made, ' '];
    }));
    $('look-told').textContent = 'In the picture, brighter is more; of the words, stronger is more.';
  } catch (fault) { $('look-told').textContent = fault.message; }
}

function list(place, texts) {
  place.hidden = !(texts && texts.length);
  place.querySelector('ol').replaceChildren(...(texts || []).map(one => element('li', {},
    element('span', {className: 'number', textContent: score(one.score)}), element('span', {textContent: one.text}))));
}

// ------------------------------------------------------------------ what people do

$('ask').onsubmit = event => {
  event.preventDefault();
  said = $('words').value.trim();
  $('file').value = '';
  search(`“${said}”`, '/words', question(said));
};
$('file').onchange = () => picture($('file').files[0]);
$('least').oninput = sift;
$('one-like').onclick = () => more(shown);
$('look').onsubmit = attend;
$('close').onclick = () => $('one').close();
$('one').onclick = event => { if (event.target === $('one')) $('one').close(); };
addEventListener('dragover', event => { event.preventDefault(); document.body.classList.add('over'); });
addEventListener('dragleave', event => { if (!event.relatedTarget) document.body.classList.remove('over'); });
addEventListener('drop', event => {
  event.preventDefault();
  document.body.classList.remove('over');
  const file = event.dataTransfer.files[0];
  if (file) { $('file').value = ''; picture(file); } else tell('Drop the file of a picture.', true);
});

ask('/about').then(found => {
  about = found;
  $('about').textContent = `${about.pictures.toLocaleString('en')} pictures of ${about.data}; ${about.model}`;
  $('ask').hidden = !about.words;
  tell(about.words ? 'Say in words what to look for, or give a picture.' : 'Give a picture: this model has no text tower.');
}, fault => tell(fault.message, true));
