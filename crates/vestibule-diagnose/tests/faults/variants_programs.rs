//! Variants of what keeps a unit's programs from running. Those that were booted with systemd 252, or run in the tree, say so.
use super::variants::Variant;

#[rustfmt::skip]
pub(crate) const PROGRAMS: &[Variant] = &[
    // what is mounted over the image's files (booted: /run, TemporaryFileSystem=, ProtectHome=)
    Variant("mkdir -p $R/run/agent; cp $R/bin/sleep $R/run/agent/start; sed -i 's#^ExecStart=.*#ExecStart=/run/agent/start 9#' $U", "exec-missing"),
    Variant("mkdir -p $R/run/agent; cp $R/bin/sleep $R/run/agent/start; echo 'C /run/agent - - - - /opt/run' > $R/etc/tmpfiles.d/a.conf; sed -i 's#^ExecStart=.*#ExecStart=/run/agent/start 9#' $U", "healthy"),
    Variant("mkdir -p $R/run/agent; cp $R/bin/sleep $R/run/agent/start; sed -i 's#^ExecStart=.*#ExecStartPre=/bin/cp /bin/sleep /run/agent/start\\nExecStart=/run/agent/start 9#' $U", "healthy"),
    Variant("cp $R/bin/sleep $R/tmp/start; echo 'tmpfs /tmp tmpfs defaults 0 0' >> $R/etc/fstab; sed -i 's#^ExecStart=.*#ExecStart=/tmp/start 9#' $U", "exec-missing"),
    Variant("cp $R/bin/sleep $R/tmp/start; dropin x <<<$'[Service]\\nPrivateTmp=yes'; sed -i 's#^ExecStart=.*#ExecStart=/tmp/start 9#' $U", "exec-missing"),
    Variant("cp $R/bin/sleep $R/tmp/start; sed -i 's#^ExecStart=.*#ExecStart=/tmp/start 9#' $U", "healthy"),
    Variant("cp $R/bin/sleep $A/start; dropin x <<<$'[Service]\\nWorkingDirectory=\\nTemporaryFileSystem=/opt:ro'; sed -i 's#^ExecStart=.*#ExecStart=/opt/vm-browser-agent/start 9#' $U", "exec-missing"),
    Variant("dropin x <<<$'[Service]\\nTemporaryFileSystem=/opt\\nBindReadOnlyPaths=/opt/vm-browser-agent'", "healthy"),
    Variant("echo 'tmpfs /opt tmpfs defaults 0 0' >> $R/etc/fstab", "working-directory-missing"),
    Variant("echo 'tmpfs /opt tmpfs noauto 0 0' >> $R/etc/fstab", "healthy"),
    Variant("echo 'tmpfs /opt tmpfs defaults 0 0' >> $R/etc/fstab; printf '[Service]\\nType=oneshot\\nExecStart=/bin/cp -a /usr/share/agent /opt/vm-browser-agent\\n' > $S/copy.service; ln -s ../copy.service $W/", "healthy"),
    Variant("dropin x <<<$'[Service]\\nInaccessiblePaths=/opt/vm-browser-agent'", "program-file-missing"),
    Variant("cp $R/bin/sleep $A/start; printf '[Mount]\\nWhat=/opt\\nWhere=/opt\\nType=none\\nOptions=bind,noexec\\n' > $S/opt.mount; mkdir -p $S/local-fs.target.wants; ln -s ../opt.mount $S/local-fs.target.wants/; sed -i 's#^ExecStart=.*#ExecStart=/opt/vm-browser-agent/start 9#' $U", "exec-not-executable"),
    // another root (booted: one that is not there)
    Variant("dropin x <<<$'[Service]\\nRootDirectory=/srv/none'", "namespace-path-missing"),
    Variant("dropin x <<<$'[Service]\\nRootImage=/srv/none.raw'", "namespace-path-missing"),
    Variant("mkdir -p $R/srv/root/usr/bin; dropin x <<<$'[Service]\\nRootDirectory=/srv/root'", "exec-missing"),
    Variant("mkdir -p $R/srv/root/usr/bin; dropin x <<<$'[Service]\\nRootDirectory=/srv/root\\nBindReadOnlyPaths=/usr /opt'", "healthy"),
    Variant("mkdir -p $R/srv/root/usr/bin; ln -s /usr/lib/node $R/srv/root/usr/bin/node; dropin x <<<$'[Service]\\nRootDirectory=/srv/root'", "healthy"),
    // the working directory (booted: another's, and one that ProtectHome= hides)
    Variant("mkdir -m 700 $R/opt/p; dropin x <<<$'[Service]\\nUser=nobody\\nWorkingDirectory=/opt/p'", "working-directory-missing"),
    Variant("mkdir -m 700 $R/opt/p; dropin x <<<$'[Service]\\nWorkingDirectory=/opt/p'", "healthy"),
    Variant("mkdir -p $R/home/agent; dropin x <<<$'[Service]\\nProtectHome=tmpfs\\nWorkingDirectory=/home/agent'", "working-directory-missing"),
    Variant("mkdir -p $R/home/agent; dropin x <<<$'[Service]\\nProtectHome=read-only\\nWorkingDirectory=/home/agent'", "healthy"),
    Variant("mv $A $R/home/; ln -s /home/vm-browser-agent $A; dropin x <<<$'[Service]\\nProtectHome=yes'", "working-directory-missing"),
    Variant("mkdir $R/run/agent; dropin x <<<$'[Service]\\nWorkingDirectory=/run/agent'", "working-directory-missing"),
    Variant("dropin x <<<$'[Service]\\nWorkingDirectory=/run/agent\\nRuntimeDirectory=agent'", "healthy"),
    Variant("printf '[Service]\\nRuntimeDirectory=agent\\nExecStart=/bin/cat\\n' > $S/maker.service; ln -s ../maker.service $W/; dropin x <<<$'[Service]\\nWorkingDirectory=/run/agent'", "healthy"),
    // interpreters and libraries (run)
    Variant("printf '#!/usr/bin/env node --no-warnings\\n' > $A/start; chmod 755 $A/start; sed -i 's#^ExecStart=.*#ExecStart=/opt/vm-browser-agent/start#' $U", "exec-interpreter-missing"),
    Variant("printf '#!/usr/bin/env -S node --no-warnings\\n' > $A/start; chmod 755 $A/start; sed -i 's#^ExecStart=.*#ExecStart=/opt/vm-browser-agent/start#' $U", "healthy"),
    Variant("printf '\\x7fELF\\x01\\x01\\x01\\0\\0\\0\\0\\0\\0\\0\\0\\0\\x02\\0\\x03\\0\\x01\\0\\0\\0\\0\\0\\0\\0\\x34\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\x34\\0\\x20\\0\\x01\\0\\0\\0\\0\\0\\0\\0\\x03\\0\\0\\0\\x54\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\x13\\0\\0\\0\\x13\\0\\0\\0\\x04\\0\\0\\0\\x01\\0\\0\\0/lib/ld-linux.so.2\\0' > $A/start; chmod 755 $A/start; sed -i 's#^ExecStart=.*#ExecStart=/opt/vm-browser-agent/start#' $U", "exec-interpreter-missing"),
    Variant("mkdir $R/opt/lib; mv $R/usr/lib/x86_64-linux-gnu/libcares.so.2* $R/opt/lib; echo /opt/lib > $R/etc/ld.so.conf.d/x.conf", "shared-library-missing"),
    Variant("chmod 600 $(readlink -f $R/usr/lib/x86_64-linux-gnu/libcares.so.2); sed -i 's/^User=.*/User=nobody/' $U", "shared-library-missing"),
    // what Node is told to load (run)
    Variant("sed -i 's#^ExecStart=.*#ExecStart=/usr/bin/node .#' $U", "program-file-missing"),
    Variant("sed -i 's#^ExecStart=.*#ExecStart=/usr/bin/node .#' $U; echo '{\"main\":\"server\"}' > $A/package.json", "healthy"),
    Variant("sed -i 's#^ExecStart=.*#ExecStart=/usr/bin/node -r ./preload.js server.js#' $U", "program-file-missing"),
    Variant("sed -i 's#^ExecStart=.*#ExecStart=/usr/bin/node --require=./preload server.js#' $U; echo > $A/preload.js", "healthy"),
    Variant("chmod 600 $A/server.js; sed -i 's/^User=.*/User=nobody/' $U", "program-file-missing"),
    Variant("chmod 640 $A/server.js; chgrp 44 $A/server.js; sed -i 's/^User=.*/User=nobody\\nSupplementaryGroups=video/' $U", "healthy"),
    Variant("echo 'import x from \"express\";' > $A/server.mjs; sed -i 's#server.js#server.mjs#' $U", "program-file-missing"),
    Variant("echo 'import x from \"./lib\";' > $A/server.mjs; echo > $A/lib.js; sed -i 's#server.js#server.mjs#' $U", "program-file-missing"),
    Variant("printf 'import fs from \"fs\";\\nimport { a,\\n  b } from \"@x/y/z\";\\n/*\\nimport q from \"q\";\\n*/\\n' > $A/server.mjs; mkdir -p $A/node_modules/@x/y; sed -i 's#server.js#server.mjs#' $U", "healthy"),
    Variant("mkdir -p $R/opt/mods/x; echo > $R/opt/mods/x/index.js; sed -i '1i const x = require(\"x\");' $A/server.js; dropin x <<<$'[Service]\\nEnvironment=NODE_PATH=/opt/mods'", "healthy"),
    Variant("sed -i 's#^ExecStart=.*#ExecStart=/usr/bin/env nodejs18 server.js#' $U", "program-file-missing"),
    Variant("sed -i 's#^ExecStart=.*#ExecStart=/usr/bin/env A=1 node server.js#' $U", "healthy"),
    Variant("sed -i 's#^ExecStart=.*#ExecStart=/bin/sh -c \"exec /opt/vm-browser-agent/start.sh\"#' $U", "program-file-missing"),
    Variant("sed -i 's#^ExecStart=.*#ExecStart=/bin/sh -c \"/opt/none || exec node server.js\"#' $U", "healthy"),
];
