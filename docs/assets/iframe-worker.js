// Browsers start no workers for pages opened from disk. There the search runs in a hidden frame
// instead: its window stands for the worker, and messages pass between the two windows.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.title = "search"
      document.body.append(frame)
      const inside = frame.contentWindow
      inside.postMessage = data =>
        setTimeout(() => this.dispatchEvent(new MessageEvent("message", { data })))
      this.ready = load(inside, new URL(url, location.href).href)
      inside.importScripts = (...urls) => Promise.all(urls.map(script => load(inside, script)))
      this.inside = inside
    }
    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
    }
  }

  function load(inside, src) {
    return new Promise((done, fail) => {
      const script = inside.document.createElement("script")
      script.onload = done
      script.onerror = fail
      script.src = src
      inside.document.body.append(script)
    })
  }
}
