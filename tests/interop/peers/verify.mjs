// Node's own TLS with SVIDs: connects to ports and says who was accepted, or serves.
//
// verify.mjs connect BUNDLE CERT KEY WANT PORT…   WANT is a SPIFFE ID, or "name" for Node's check
// verify.mjs serve BUNDLE CERT KEY WANT
import fs from "node:fs";
import tls from "node:tls";

const [mode, bundle, cert, key, want, ...ports] = process.argv.slice(2);
const own = { ca: fs.readFileSync(bundle), cert: fs.readFileSync(cert), key: fs.readFileSync(key) };
const names = (peer) => (peer.subjectaltname ?? "").split(", ");
const uri = `URI:${want}`;

function connect(port) {
  const check = (_, peer) =>
    names(peer).includes(uri) ? undefined : new Error(`not ${want}`);
  const options = {
    ...own, host: "127.0.0.1", port, servername: "localhost",
    ...(want === "name" ? {} : { checkServerIdentity: check }),
  };
  return new Promise((done) => {
    const socket = tls.connect(options, () => socket.write("GET / HTTP/1.0\r\n\r\n"));
    socket.once("data", (data) => {
      socket.destroy();
      done(data.includes("hello") ? "accepted" : `odd answer ${data}`);
    });
    socket.once("error", (error) => done(`refused ${error.code ?? error.message}`));
  });
}

if (mode === "connect") {
  for (const port of ports) console.log(`${port} ${await connect(Number(port))}`);
} else {
  const options = { ...own, requestCert: true, rejectUnauthorized: true };
  const server = tls.createServer(options, (socket) => {
    socket.on("error", () => {});
    if (!names(socket.getPeerCertificate()).includes(uri)) return socket.destroy();
    socket.once("data", () => socket.end("HTTP/1.0 200 OK\r\n\r\nhello"));
  });
  server.on("tlsClientError", () => {});
  server.listen(0, "127.0.0.1", () => console.log(`listening ${server.address().port}`));
}
