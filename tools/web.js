// Live pictures: an <img data-live="address"> shows what its address has now, asked for again and again.
// Not an endless answer: a browser has six connections to a server, and keeps those of pictures long gone.
"use strict";
(() => {
  const PERIOD_MS = 100;

  async function look(image) {
    const answer = await fetch(image.dataset.live, { cache: "no-cache" });
    const number = answer.headers.get("etag");
    if (!answer.ok || number === image.dataset.number) return;
    const before = image.src;
    image.src = URL.createObjectURL(await answer.blob());
    image.dataset.number = number;
    if (before.startsWith("blob:")) URL.revokeObjectURL(before);
  }

  async function lookAtAll() {
    for (const image of document.querySelectorAll("img[data-live]")) {
      // A server that is gone says so elsewhere on the page; its last picture stays.
      await look(image).catch(() => {});
    }
    setTimeout(lookAtAll, PERIOD_MS);
  }

  lookAtAll();
})();
