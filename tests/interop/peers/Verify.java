// The JDK's TLS and PKIX with SVIDs: connects to ports and says who was accepted, or serves.
//
// java Verify.java connect|serve BUNDLE CERT KEY WANT PORT…
import java.io.InputStream;
import java.net.InetAddress;
import java.net.Socket;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyFactory;
import java.security.KeyStore;
import java.security.PrivateKey;
import java.security.cert.Certificate;
import java.security.cert.CertificateException;
import java.security.cert.CertificateFactory;
import java.security.cert.X509Certificate;
import java.security.spec.PKCS8EncodedKeySpec;
import java.util.Base64;
import java.util.List;
import javax.net.ssl.KeyManagerFactory;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLEngine;
import javax.net.ssl.SSLServerSocket;
import javax.net.ssl.SSLSocket;
import javax.net.ssl.TrustManager;
import javax.net.ssl.TrustManagerFactory;
import javax.net.ssl.X509ExtendedTrustManager;

public class Verify {
    /** PKIX against our roots, and then the one URI that the certificate must name. */
    static final class ById extends X509ExtendedTrustManager {
        private final X509ExtendedTrustManager path;
        private final String want;

        ById(X509ExtendedTrustManager path, String want) {
            this.path = path;
            this.want = want;
        }

        private void id(X509Certificate[] chain) throws CertificateException {
            int uris = 0;
            boolean found = false;
            for (List<?> name : chain[0].getSubjectAlternativeNames()) {
                if ((Integer) name.get(0) == 6) {
                    uris++;
                    found = want.equals(name.get(1));
                }
            }
            if (uris != 1 || !found) throw new CertificateException("not " + want);
        }

        public void checkServerTrusted(X509Certificate[] c, String a) throws CertificateException {
            path.checkServerTrusted(c, a);
            id(c);
        }

        public void checkServerTrusted(X509Certificate[] c, String a, Socket s)
                throws CertificateException {
            path.checkServerTrusted(c, a, s);
            id(c);
        }

        public void checkServerTrusted(X509Certificate[] c, String a, SSLEngine e)
                throws CertificateException {
            path.checkServerTrusted(c, a, e);
            id(c);
        }

        public void checkClientTrusted(X509Certificate[] c, String a) throws CertificateException {
            path.checkClientTrusted(c, a);
            id(c);
        }

        public void checkClientTrusted(X509Certificate[] c, String a, Socket s)
                throws CertificateException {
            path.checkClientTrusted(c, a, s);
            id(c);
        }

        public void checkClientTrusted(X509Certificate[] c, String a, SSLEngine e)
                throws CertificateException {
            path.checkClientTrusted(c, a, e);
            id(c);
        }

        public X509Certificate[] getAcceptedIssuers() {
            return path.getAcceptedIssuers();
        }
    }

    static Certificate[] certificates(String file) throws Exception {
        try (InputStream in = Files.newInputStream(Path.of(file))) {
            return CertificateFactory.getInstance("X.509").generateCertificates(in)
                    .toArray(new Certificate[0]);
        }
    }

    static SSLContext context(String bundle, String cert, String key, String want)
            throws Exception {
        KeyStore roots = KeyStore.getInstance("PKCS12");
        roots.load(null, null);
        int number = 0;
        for (Certificate one : certificates(bundle)) roots.setCertificateEntry("r" + number++, one);
        TrustManagerFactory trust = TrustManagerFactory.getInstance("PKIX");
        trust.init(roots);
        String base64 = Files.readString(Path.of(key)).replaceAll("-----[A-Z ]+-----|\\s", "");
        PrivateKey secret = KeyFactory.getInstance("EC").generatePrivate(
                new PKCS8EncodedKeySpec(Base64.getDecoder().decode(base64)));
        KeyStore own = KeyStore.getInstance("PKCS12");
        own.load(null, null);
        own.setKeyEntry("svid", secret, new char[0], certificates(cert));
        KeyManagerFactory keys = KeyManagerFactory.getInstance("PKIX");
        keys.init(own, new char[0]);
        TrustManager byId = new ById((X509ExtendedTrustManager) trust.getTrustManagers()[0], want);
        SSLContext made = SSLContext.getInstance("TLS");
        made.init(keys.getKeyManagers(), new TrustManager[] {byId}, null);
        return made;
    }

    static String connect(SSLContext context, int port) {
        try (Socket socket = context.getSocketFactory().createSocket("127.0.0.1", port)) {
            socket.getOutputStream().write("GET / HTTP/1.0\r\n\r\n".getBytes());
            String said = new String(socket.getInputStream().readAllBytes());
            return said.contains("hello") ? "accepted" : "odd answer " + said;
        } catch (Exception error) {
            Throwable cause = error;
            while (cause.getCause() != null) cause = cause.getCause();
            return "refused " + cause.getMessage().replace('\n', ' ');
        }
    }

    public static void main(String[] given) throws Exception {
        SSLContext context = context(given[1], given[2], given[3], given[4]);
        if (given[0].equals("connect")) {
            for (int i = 5; i < given.length; i++) {
                System.out.println(given[i] + " " + connect(context, Integer.parseInt(given[i])));
            }
            return;
        }
        try (SSLServerSocket server = (SSLServerSocket) context.getServerSocketFactory()
                .createServerSocket(0, 20, InetAddress.getLoopbackAddress())) {
            server.setNeedClientAuth(true);
            System.out.println("listening " + server.getLocalPort());
            while (true) {
                try (SSLSocket socket = (SSLSocket) server.accept()) {
                    socket.getInputStream().read();
                    socket.getOutputStream().write("HTTP/1.0 200 OK\r\n\r\nhello".getBytes());
                } catch (Exception refused) {
                    // The peer sees an alert; the next one is served.
                }
            }
        }
    }
}
