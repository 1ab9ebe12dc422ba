-- A database of revision 0002, upgraded from that of 0001; never edited.
BEGIN TRANSACTION;
CREATE TABLE api_key (
	prefix VARCHAR(16) NOT NULL, 
	name TEXT NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	scopes JSON NOT NULL, 
	owner VARCHAR(64) NOT NULL, 
	created_at DOUBLE NOT NULL, 
	expires_at DOUBLE, 
	revoked_at DOUBLE, 
	last_used_at DOUBLE, 
	CONSTRAINT pk_api_key PRIMARY KEY (prefix)
);
CREATE TABLE attempt (
	evaluation_id INTEGER NOT NULL, 
	fence INTEGER NOT NULL, 
	worker TEXT NOT NULL, 
	started_at DOUBLE NOT NULL, 
	ended_at DOUBLE, 
	outcome VARCHAR(16), 
	seconds DOUBLE, 
	failure VARCHAR(16), 
	message TEXT, 
	log TEXT, 
	facts JSON, 
	late JSON, 
	CONSTRAINT pk_attempt PRIMARY KEY (evaluation_id, fence), 
	CONSTRAINT fk_attempt_evaluation_id FOREIGN KEY(evaluation_id) REFERENCES evaluation (id)
);
INSERT INTO "attempt" VALUES(1,1,'host/boot.1/100/1.00',1.79523022518799591062e+09,1.79523022520099139213e+09,'succeeded',0.5,NULL,NULL,NULL,'{"rss_bytes":1024}',NULL);
INSERT INTO "attempt" VALUES(2,1,'host/boot.1/100/1.00',1.79523022521100950239e+09,1.79523022521998143192e+09,'failed',0.25,'nan','kl is nan','the log','{}',NULL);
INSERT INTO "attempt" VALUES(3,1,'host/boot.1/100/1.00',1.79523022523599410055e+09,1.79523022524098300935e+09,'lost',NULL,'lost','no sign of life','',NULL,NULL);
INSERT INTO "attempt" VALUES(3,3,'host/boot.1/100/1.00',1.79523022524798369411e+09,1795230225.25599,'lost',NULL,'lost','no sign of life','',NULL,NULL);
INSERT INTO "attempt" VALUES(3,5,'host/boot.1/100/1.00',1.79523022526101922987e+09,1.79523022526801967618e+09,'lost',NULL,'lost','no sign of life; lost 3 workers, so it is not tried again','',NULL,NULL);
INSERT INTO "attempt" VALUES(4,1,'host/boot.1/100/1.00',1.79523022527401447299e+09,1.79523022528399229047e+09,'released',NULL,NULL,NULL,NULL,NULL,'{"facts":{},"measurements":[],"seconds":1.0}');
CREATE TABLE autoeff_alembic (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT autoeff_alembic_pkc PRIMARY KEY (version_num)
);
INSERT INTO "autoeff_alembic" VALUES('0002');
CREATE TABLE configuration (
	digest VARCHAR(64) NOT NULL, 
	canonical TEXT NOT NULL, 
	CONSTRAINT pk_configuration PRIMARY KEY (digest)
);
INSERT INTO "configuration" VALUES('45ff3a05b13667dc9a0b80a4d21d7357d48a3cda851b20c2a0e9749b7992230a','{"a:bits":2,"b:skip":"none"}');
INSERT INTO "configuration" VALUES('83e71e788b95fbed48ee51ed968b4fccacffea895694dbb1f5724c318e459cce','{"a:bits":3,"b:skip":"none"}');
INSERT INTO "configuration" VALUES('11a81e1798d1257084c6ea320780ab21c1927f038100d51f865b535e42223df2','{"a:bits":4,"b:skip":"none"}');
INSERT INTO "configuration" VALUES('a513dee0da8b7adb8eb9e3c263f53d945346ca57d78114251fcc6ff37e978136','{"a:bits":5,"b:skip":"none"}');
CREATE TABLE "evaluation" (
	id INTEGER NOT NULL, 
	configuration VARCHAR(64) NOT NULL, 
	eval_key VARCHAR(64) NOT NULL, 
	split VARCHAR(16) NOT NULL, 
	windows INTEGER NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	attempts INTEGER NOT NULL, 
	losses INTEGER NOT NULL, 
	fence INTEGER NOT NULL, 
	worker TEXT, 
	lease_until DOUBLE, 
	accepted_fence INTEGER, 
	created_at DOUBLE NOT NULL, 
	ended_at DOUBLE, 
	queue VARCHAR(64), 
	CONSTRAINT pk_evaluation PRIMARY KEY (id), 
	CONSTRAINT ck_evaluation_decided CHECK ((state IN ('queued', 'running')) = (accepted_fence IS NULL)), 
	CONSTRAINT ck_evaluation_state CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'quarantined', 'cancelled')), 
	CONSTRAINT ck_evaluation_leased CHECK ((state = 'running') = (lease_until IS NOT NULL)), 
	CONSTRAINT fk_evaluation_configuration FOREIGN KEY(configuration) REFERENCES configuration (digest)
);
INSERT INTO "evaluation" VALUES(1,'45ff3a05b13667dc9a0b80a4d21d7357d48a3cda851b20c2a0e9749b7992230a','b7a7d521802ab4c64ad3f77a576aa78b81c7e932bb5a9b217b9f1c80251661ab','search',16,'succeeded',1,0,1,'host/boot.1/100/1.00',NULL,1,1.79523022517898368831e+09,1.79523022519998550414e+09,NULL);
INSERT INTO "evaluation" VALUES(2,'83e71e788b95fbed48ee51ed968b4fccacffea895694dbb1f5724c318e459cce','553f32e338e66865f097b0731a287cebd8cb507178706e402b046dc7f4dcac6b','search',16,'failed',1,0,1,'host/boot.1/100/1.00',NULL,1,1.79523022520799183845e+09,1.7952302252190158367e+09,NULL);
INSERT INTO "evaluation" VALUES(3,'11a81e1798d1257084c6ea320780ab21c1927f038100d51f865b535e42223df2','16483c0e72d345637a8f65d9e379e37d51c21a9390dd6d4a927e20b3d980b1b2','search',16,'quarantined',3,2,5,'host/boot.1/100/1.00',NULL,5,1.79523022522798776623e+09,1.79523022526701402663e+09,NULL);
INSERT INTO "evaluation" VALUES(4,'a513dee0da8b7adb8eb9e3c263f53d945346ca57d78114251fcc6ff37e978136','0dd6b800720edc2926c1547cc95501df8e7f4b08341467706f59ab8101fde0c5','search',16,'queued',1,0,2,NULL,NULL,NULL,1.79523022527200269695e+09,NULL,NULL);
CREATE TABLE event (
	job_id VARCHAR(64) NOT NULL, 
	seq INTEGER NOT NULL, 
	kind VARCHAR(32) NOT NULL, 
	body JSON NOT NULL, 
	created_at DOUBLE NOT NULL, 
	CONSTRAINT pk_event PRIMARY KEY (job_id, seq), 
	CONSTRAINT fk_event_job_id FOREIGN KEY(job_id) REFERENCES job (id)
);
INSERT INTO "event" VALUES('first',1,'job.created','{}',1.79523022515098142626e+09);
INSERT INTO "event" VALUES('first',2,'job.coordinator','{"fence":1,"owner":"host/boot.1/100/1.00"}',1.79523022516099953647e+09);
INSERT INTO "event" VALUES('first',3,'job.running','{}',1.79523022516900587078e+09);
INSERT INTO "event" VALUES('first',4,'trial.proposed','{"digest":"45ff3a05b13667dc9a0b80a4d21d7357d48a3cda851b20c2a0e9749b7992230a","origin":"searched","trial":0}',1.79523022518200135234e+09);
INSERT INTO "event" VALUES('first',5,'trial.running','{"attempt":1,"trial":0,"worker":"host/boot.1/100/1.00"}',1.7952302251890017987e+09);
INSERT INTO "event" VALUES('first',6,'trial.succeeded','{"seconds":0.5,"trial":0}',1.79523022520199728013e+09);
INSERT INTO "event" VALUES('first',7,'trial.proposed','{"digest":"83e71e788b95fbed48ee51ed968b4fccacffea895694dbb1f5724c318e459cce","origin":"searched","trial":1}',1.79523022521000361444e+09);
INSERT INTO "event" VALUES('first',8,'trial.running','{"attempt":1,"trial":1,"worker":"host/boot.1/100/1.00"}',1.79523022521100950239e+09);
INSERT INTO "event" VALUES('first',9,'trial.failed','{"failure":"nan","trial":1}',1.79523022522098731987e+09);
INSERT INTO "event" VALUES('first',10,'trial.proposed','{"digest":"11a81e1798d1257084c6ea320780ab21c1927f038100d51f865b535e42223df2","origin":"searched","trial":2}',1.79523022522899365419e+09);
INSERT INTO "event" VALUES('first',11,'trial.running','{"attempt":1,"trial":2,"worker":"host/boot.1/100/1.00"}',1.79523022523599410055e+09);
INSERT INTO "event" VALUES('first',12,'trial.queued','{"reason":"no sign of life","trial":2}',1.79523022524198889735e+09);
INSERT INTO "event" VALUES('first',13,'trial.running','{"attempt":2,"trial":2,"worker":"host/boot.1/100/1.00"}',1.79523022524798369411e+09);
INSERT INTO "event" VALUES('first',14,'trial.queued','{"reason":"no sign of life","trial":2}',1795230225.25599);
INSERT INTO "event" VALUES('first',15,'trial.running','{"attempt":3,"trial":2,"worker":"host/boot.1/100/1.00"}',1.79523022526198482509e+09);
INSERT INTO "event" VALUES('first',16,'trial.quarantined','{"reason":"no sign of life","trial":2}',1.79523022526898527141e+09);
INSERT INTO "event" VALUES('first',17,'trial.proposed','{"digest":"a513dee0da8b7adb8eb9e3c263f53d945346ca57d78114251fcc6ff37e978136","origin":"searched","trial":3}',1.79523022527300858504e+09);
INSERT INTO "event" VALUES('first',18,'trial.running','{"attempt":1,"trial":3,"worker":"host/boot.1/100/1.00"}',1.79523022527401447299e+09);
INSERT INTO "event" VALUES('first',19,'trial.queued','{"reason":"the worker was asked to stop","trial":3}',1.79523022528499817847e+09);
CREATE TABLE hardware (
	id INTEGER NOT NULL, 
	fingerprint VARCHAR(64) NOT NULL, 
	kind VARCHAR(64) NOT NULL, 
	facts JSON NOT NULL, 
	created_at DOUBLE NOT NULL, 
	CONSTRAINT pk_hardware PRIMARY KEY (id), 
	UNIQUE (fingerprint)
);
CREATE TABLE idempotency (
	key_prefix VARCHAR(16) NOT NULL, 
	idempotency_key VARCHAR(255) NOT NULL, 
	request_hash VARCHAR(64) NOT NULL, 
	status INTEGER NOT NULL, 
	body JSON NOT NULL, 
	expires_at DOUBLE NOT NULL, 
	CONSTRAINT pk_idempotency PRIMARY KEY (key_prefix, idempotency_key), 
	CONSTRAINT fk_idempotency_key_prefix FOREIGN KEY(key_prefix) REFERENCES api_key (prefix)
);
CREATE TABLE "job" (
	id VARCHAR(64) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	spec JSON NOT NULL, 
	preflight JSON NOT NULL, 
	space JSON NOT NULL, 
	setup_digest VARCHAR(64) NOT NULL, 
	result JSON, 
	created_at DOUBLE NOT NULL, 
	ended_at DOUBLE, 
	coordinator TEXT, 
	coordinator_until DOUBLE, 
	coordinator_fence INTEGER NOT NULL, 
	trials INTEGER NOT NULL, 
	succeeded INTEGER NOT NULL, 
	failed INTEGER NOT NULL, 
	quarantined INTEGER NOT NULL, 
	cost DOUBLE NOT NULL, 
	events INTEGER NOT NULL, 
	version INTEGER DEFAULT '1' NOT NULL, 
	owner VARCHAR(64), 
	queue VARCHAR(64), 
	budget JSON, 
	error TEXT, 
	cancelled INTEGER DEFAULT '0' NOT NULL, 
	CONSTRAINT pk_job PRIMARY KEY (id), 
	CONSTRAINT ck_job_state CHECK (state IN ('pending', 'running', 'paused', 'cancelling', 'succeeded', 'failed', 'cancelled'))
);
INSERT INTO "job" VALUES('first','running','{"model":"demo","seed":0}','{"least":{"weight_bytes":1024}}','{"decisions":[],"format":1}','59b3271285bc5043d298c95e8b48d92f93cac65ed7c9136b86f43063bf3b2b21',NULL,1.79523022514498686785e+09,NULL,'host/boot.1/100/1.00',1.79523022516099953647e+09,1,4,1,1,1,4.0,19,1,NULL,NULL,NULL,NULL,0);
CREATE TABLE measurement (
	evaluation_id INTEGER NOT NULL, 
	name VARCHAR(64) NOT NULL, 
	split VARCHAR(16) NOT NULL, 
	tokens INTEGER NOT NULL, 
	statistic VARCHAR(16) NOT NULL, 
	value DOUBLE NOT NULL, 
	unit VARCHAR(32) NOT NULL, 
	spread DOUBLE, 
	method VARCHAR(16) NOT NULL, 
	hardware TEXT, 
	CONSTRAINT pk_measurement PRIMARY KEY (evaluation_id, name, split, tokens, statistic), 
	CONSTRAINT fk_measurement_evaluation_id FOREIGN KEY(evaluation_id) REFERENCES evaluation (id)
);
INSERT INTO "measurement" VALUES(1,'kl','search',2048,'mean',0.125,'nats/token',0.5,'measured',NULL);
CREATE TABLE outbox (
	evaluation_id INTEGER NOT NULL, 
	queue VARCHAR(64) NOT NULL, 
	not_before DOUBLE NOT NULL, 
	sent INTEGER NOT NULL, 
	CONSTRAINT pk_outbox PRIMARY KEY (evaluation_id), 
	CONSTRAINT fk_outbox_evaluation_id FOREIGN KEY(evaluation_id) REFERENCES evaluation (id)
);
CREATE TABLE trial (
	job_id VARCHAR(64) NOT NULL, 
	number INTEGER NOT NULL, 
	evaluation_id INTEGER NOT NULL, 
	origin VARCHAR(16) NOT NULL, 
	label TEXT, 
	feasible BOOLEAN NOT NULL, 
	cost DOUBLE NOT NULL, 
	costs JSON NOT NULL, 
	sampler_state JSON, 
	created_at DOUBLE NOT NULL, 
	told_at DOUBLE, 
	CONSTRAINT pk_trial PRIMARY KEY (job_id, number), 
	CONSTRAINT fk_trial_job_id FOREIGN KEY(job_id) REFERENCES job (id), 
	CONSTRAINT fk_trial_evaluation_id FOREIGN KEY(evaluation_id) REFERENCES evaluation (id)
);
INSERT INTO "trial" VALUES('first',0,1,'searched','bits=2',1,1.0,'{"avg_bits":3.25,"linear_bytes":4096.0}','{"generation":0}',1.79523022518099546439e+09,1.79523022520899772644e+09);
INSERT INTO "trial" VALUES('first',1,2,'searched',NULL,1,1.0,'{"avg_bits":3.25,"linear_bytes":4096.0}',NULL,1.79523022520899772644e+09,NULL);
INSERT INTO "trial" VALUES('first',2,3,'searched',NULL,1,1.0,'{"avg_bits":3.25,"linear_bytes":4096.0}',NULL,1.79523022522899365419e+09,NULL);
INSERT INTO "trial" VALUES('first',3,4,'searched',NULL,1,1.0,'{"avg_bits":3.25,"linear_bytes":4096.0}',NULL,1.79523022527200269695e+09,NULL);
CREATE TABLE worker (
	id VARCHAR(255) NOT NULL, 
	hardware_id INTEGER NOT NULL, 
	queues JSON NOT NULL, 
	started_at DOUBLE NOT NULL, 
	seen_until DOUBLE NOT NULL, 
	CONSTRAINT pk_worker PRIMARY KEY (id), 
	CONSTRAINT fk_worker_hardware_id FOREIGN KEY(hardware_id) REFERENCES hardware (id)
);
CREATE INDEX ix_trial_evaluation_id_job_id ON trial (evaluation_id, job_id);
CREATE INDEX ix_trial_untold ON trial (job_id, number) WHERE told_at IS NULL;
CREATE TRIGGER attempt_update_is_final BEFORE UPDATE OF outcome, ended_at, seconds, failure, message, log, facts ON attempt WHEN OLD.outcome IS NOT NULL BEGIN SELECT RAISE(ABORT, 'attempt is final'); END;
CREATE TRIGGER measurement_update_is_final BEFORE UPDATE ON measurement WHEN 1 BEGIN SELECT RAISE(ABORT, 'measurement is final'); END;
CREATE TRIGGER event_update_is_final BEFORE UPDATE ON event WHEN 1 BEGIN SELECT RAISE(ABORT, 'event is final'); END;
CREATE TRIGGER attempt_delete_is_final BEFORE DELETE ON attempt WHEN 1 BEGIN SELECT RAISE(ABORT, 'attempt is final'); END;
CREATE TRIGGER measurement_delete_is_final BEFORE DELETE ON measurement WHEN 1 BEGIN SELECT RAISE(ABORT, 'measurement is final'); END;
CREATE TRIGGER event_delete_is_final BEFORE DELETE ON event WHEN 1 BEGIN SELECT RAISE(ABORT, 'event is final'); END;
CREATE INDEX ix_job_created_at_id ON job (created_at, id);
CREATE INDEX ix_job_owner_created_at_id ON job (owner, created_at, id);
CREATE INDEX ix_job_open ON job (state) WHERE queue IS NOT NULL AND state IN ('pending', 'running', 'cancelling');
CREATE INDEX ix_evaluation_eval_key ON evaluation (eval_key);
CREATE INDEX ix_evaluation_lease_until ON evaluation (lease_until) WHERE state = 'running';
CREATE UNIQUE INDEX uq_evaluation_eval_key ON evaluation (eval_key) WHERE state IN ('queued', 'running', 'succeeded');
CREATE INDEX ix_outbox_queue_evaluation_id ON outbox (queue, evaluation_id);
CREATE INDEX ix_outbox_not_before ON outbox (not_before);
CREATE INDEX ix_worker_seen_until ON worker (seen_until);
CREATE INDEX ix_idempotency_expires_at ON idempotency (expires_at);
CREATE TRIGGER evaluation_update_is_final BEFORE UPDATE ON evaluation WHEN OLD.state IN ('succeeded', 'failed', 'quarantined', 'cancelled') BEGIN SELECT RAISE(ABORT, 'evaluation is final'); END;
CREATE TRIGGER job_update_is_final BEFORE UPDATE OF state ON job WHEN OLD.state IN ('succeeded', 'cancelled') AND NEW.state <> OLD.state BEGIN SELECT RAISE(ABORT, 'job is final'); END;
CREATE TRIGGER evaluation_delete_is_final BEFORE DELETE ON evaluation WHEN 1 = 1 BEGIN SELECT RAISE(ABORT, 'evaluation is final'); END;
COMMIT;
