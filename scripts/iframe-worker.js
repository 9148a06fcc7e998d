// The site's search runs in a Web Worker, and browsers start none for a page that is a file. For such a
// page a hidden frame runs the worker's script: what the script posts becomes an event of this object.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.body.appendChild(document.createElement("iframe"));
      this.frame.hidden = true;
      const scope = this.frame.contentWindow;
      scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.ready = new Promise((done) => {
        const script = scope.document.createElement("script");
        script.src = url;
        script.onload = done;
        scope.document.body.append(script);
      });
    }
    async postMessage(data) {
      await this.ready;
      const scope = this.frame.contentWindow;
      scope.dispatchEvent(new scope.MessageEvent("message", { data }));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
