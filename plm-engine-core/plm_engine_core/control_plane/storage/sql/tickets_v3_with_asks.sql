-- Time-outs and votes, now that a ticket may be an ask: of approvals everything is as it was, for nodes of every release.

-- What happens to a pending ticket whose deadline has passed: the policy under which it was opened said so. It is handed on
-- to a wider circle once, with a new deadline, or expires and its run goes on to a denial. The caller holds run and ticket.
-- As before, but that the step of an ask ends with its ticket.
CREATE OR REPLACE FUNCTION engine_time_out_ticket_v2(p_ticket approval_tickets, p_actor text) RETURNS approval_tickets
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_ticket approval_tickets;
BEGIN
    IF p_ticket.state <> 'pending' OR p_ticket.deadline > clock_timestamp() THEN
        RETURN p_ticket;
    END IF;
    IF p_ticket.escalate_seconds IS NOT NULL AND p_ticket.escalated_at IS NULL THEN
        UPDATE approval_tickets SET escalated_at = clock_timestamp(),
                deadline = clock_timestamp() + make_interval(secs => escalate_seconds)
            WHERE tenant_id = p_ticket.tenant_id AND id = p_ticket.id RETURNING * INTO v_ticket;
    ELSE
        UPDATE approval_tickets SET state = 'expired'
            WHERE tenant_id = p_ticket.tenant_id AND id = p_ticket.id RETURNING * INTO v_ticket;
        UPDATE run_states SET state = 'queued', reason = NULL, message = NULL, updated_at = clock_timestamp()
            WHERE tenant_id = p_ticket.tenant_id AND run_id = p_ticket.run_id AND state = 'awaiting_approval';
        IF p_ticket.capability = 'provide_input' THEN
            PERFORM engine_end_ask_v1(p_ticket, NULL, 'input_expired', format('nobody gave the input until %s', p_ticket.deadline));
        END IF;
    END IF;
    PERFORM engine_append_event_v1(v_ticket.tenant_id, 'run/' || v_ticket.run_id,
        CASE v_ticket.state WHEN 'expired' THEN 'approval_expired' ELSE 'approval_escalated' END, p_actor,
        jsonb_build_object('ticket_id', v_ticket.id, 'step', v_ticket.step_index, 'attempt', v_ticket.attempt,
            'deadline', CASE v_ticket.state WHEN 'expired' THEN p_ticket.deadline ELSE v_ticket.deadline END));
    RETURN v_ticket;
END
$$;

-- What a ticket looked like to who read it: another one whenever its state, votes or comments are others. hitl/ticket.py makes
-- the same of what it reads. A comment is added without holding the ticket: one that comes at the very moment of a vote stands beside it.
CREATE FUNCTION engine_ticket_revision_v1(p_ticket approval_tickets) RETURNS text
LANGUAGE sql STABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
    SELECT concat_ws('-', p_ticket.state, CASE WHEN p_ticket.escalated_at IS NULL THEN 0 ELSE 1 END, count(*),
        COALESCE((extract(epoch FROM max(v.voted_at)) * 1000000)::bigint, 0),
        (SELECT count(*) FROM approval_comments AS c WHERE c.tenant_id = p_ticket.tenant_id AND c.ticket_id = p_ticket.id))
    FROM approval_votes AS v WHERE v.tenant_id = p_ticket.tenant_id AND v.ticket_id = p_ticket.id
$$;

-- Why a voter cannot be counted, or null. Nobody decides what they asked for themselves, or had asked for by delegation;
-- an input, which allows nothing, they may give where the command says that the policy lets them. A command of a node that knows
-- no asks says nothing of it, and can only deny one. Who says as which revision it was read is refused when it is another now.
CREATE OR REPLACE FUNCTION engine_refused_vote_v3(p_ticket approval_tickets, p_principal jsonb, c jsonb) RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_input constant boolean := p_ticket.capability = 'provide_input';
BEGIN
    IF v_input AND c ->> 'vote' = 'approve' THEN
        RETURN jsonb_build_object('reason', 'ticket_kind',
            'message', 'the ticket asks for an input: give it with provide_input, or deny it');
    ELSIF NOT v_input AND c ->> 'vote' = 'provide_input' THEN
        RETURN jsonb_build_object('reason', 'ticket_kind', 'message', 'the ticket asks for an approval: approve or deny it');
    ELSIF NOT (v_input AND COALESCE((c ->> 'requester_may')::boolean, false))
       AND (p_ticket.requested_by = (c ->> 'voter')::uuid OR COALESCE(p_principal -> 'delegated_by', '[]') ? (c ->> 'voter')) THEN
        RETURN jsonb_build_object('reason', 'separation_of_duties', 'message', CASE WHEN v_input
            THEN 'the policy has the requester of a run answer none of its asks, nor who had it requested'
            ELSE 'the requester of a call cannot decide its approval, nor can who had it requested' END);
    ELSIF p_ticket.state = 'expired' THEN
        RETURN jsonb_build_object('reason', 'approval_expired', 'message', format('the deadline %s has passed; the %s is denied',
            p_ticket.deadline, CASE WHEN v_input THEN 'ask' ELSE 'call' END));
    ELSIF p_ticket.state <> 'pending' THEN
        RETURN jsonb_build_object('reason', 'already_decided',
            'message', format('the ticket is already %s', p_ticket.state));
    ELSIF (p_ticket.escalated_at IS NOT NULL) <> (c -> 'escalated')::boolean THEN
        RETURN jsonb_build_object('reason', 'escalated',
            'message', 'the ticket was handed on meanwhile; whoever decides it now needs another OAuth scope');
    ELSIF EXISTS (SELECT FROM approval_votes
                  WHERE tenant_id = p_ticket.tenant_id AND ticket_id = p_ticket.id AND voter = (c ->> 'voter')::uuid
                    AND vote <> c ->> 'vote') THEN
        RETURN jsonb_build_object('reason', 'already_voted',
            'message', 'you have voted on this ticket before, the other way; a vote is given once');
    ELSIF c ->> 'as_read' <> engine_ticket_revision_v1(p_ticket) THEN
        RETURN jsonb_build_object('reason', 'changed_meanwhile',
            'message', 'the ticket was voted or commented on, or handed on, since it was read');
    END IF;
    RETURN NULL;
END
$$;

-- Counts one vote: a denial ends the ticket, and so do `quorum` approvals by different people inside the deadline, each given
-- with the authority that is asked for now. Who approved before that was asked for may approve again, with it. A denial of an
-- ask ends its step too.
-- Answers {"status": "decided" | "counted" | "refused", ...}; the same vote by the same person again answers the same.
CREATE OR REPLACE FUNCTION engine_decide_ticket_v3(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_tenant    uuid := (c ->> 'tenant_id')::uuid;
    v_id        uuid := (c ->> 'ticket_id')::uuid;
    v_voter     uuid := (c ->> 'voter')::uuid;
    v_authority text[] := ARRAY(SELECT jsonb_array_elements_text(c -> 'authority'));
    v_run       run_states;
    v_was       text;
    v_ticket    approval_tickets;
    v_refusal   jsonb;
    v_votes     integer;
    v_state     text;
    v_scope     jsonb;
BEGIN
    PERFORM engine_enter_v1(v_tenant);
    SELECT run_id INTO v_ticket.run_id FROM approval_tickets WHERE tenant_id = v_tenant AND id = v_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PLN01', MESSAGE = 'not found', TABLE = 'approval ticket', DETAIL = v_id;
    END IF;
    SELECT * INTO v_run FROM run_states WHERE tenant_id = v_tenant AND run_id = v_ticket.run_id FOR UPDATE;
    SELECT * INTO v_ticket FROM approval_tickets WHERE tenant_id = v_tenant AND id = v_id FOR UPDATE;
    -- Tickets that version 1 decided have a decider and no votes.
    IF EXISTS (SELECT FROM approval_votes WHERE tenant_id = v_tenant AND ticket_id = v_id AND voter = v_voter
               AND vote = c ->> 'vote' AND (authority @> v_authority OR v_ticket.state <> 'pending'))
       OR (v_ticket.decided_by = v_voter AND v_ticket.state = CASE c ->> 'vote' WHEN 'approve' THEN 'approved' ELSE 'denied' END)
    THEN
        RETURN jsonb_build_object('status', CASE v_ticket.state WHEN 'pending' THEN 'counted' ELSE 'decided' END,
            'run_id', v_ticket.run_id, 'replayed', true, 'deliver', false);
    END IF;
    v_was := v_ticket.state;
    v_ticket := engine_time_out_ticket_v2(v_ticket, c ->> 'actor');
    v_refusal := engine_refused_vote_v3(v_ticket, v_run.principal, c);
    IF v_refusal IS NOT NULL THEN
        RETURN v_refusal || jsonb_build_object('status', 'refused', 'run_id', v_ticket.run_id,
            'deliver', v_was = 'pending' AND v_ticket.state = 'expired');
    END IF;

    INSERT INTO approval_votes (tenant_id, ticket_id, voter, vote, comment, authority, scope_uses, scope_seconds,
            scope_any_resource)
        VALUES (v_tenant, v_id, v_voter, c ->> 'vote', c ->> 'comment', v_authority,
            (c #>> '{scope,uses}')::integer, (c #>> '{scope,seconds}')::double precision,
            (c #>> '{scope,any_resource}')::boolean)
        ON CONFLICT (tenant_id, ticket_id, voter) DO UPDATE SET comment = EXCLUDED.comment, authority = EXCLUDED.authority,
            scope_uses = EXCLUDED.scope_uses, scope_seconds = EXCLUDED.scope_seconds,
            scope_any_resource = EXCLUDED.scope_any_resource, voted_at = EXCLUDED.voted_at;
    SELECT count(*) INTO v_votes FROM approval_votes
        WHERE tenant_id = v_tenant AND ticket_id = v_id AND vote = 'approve' AND authority @> v_authority;
    v_state := CASE WHEN c ->> 'vote' = 'deny' THEN 'denied' WHEN v_votes >= (c ->> 'quorum')::integer THEN 'approved' END;
    IF v_state IS NOT NULL THEN
        UPDATE approval_tickets SET state = v_state, decided_at = clock_timestamp(), decided_by = v_voter,
                comment = c ->> 'comment'
            WHERE tenant_id = v_tenant AND id = v_id AND state = 'pending';
        UPDATE run_states SET state = 'queued', reason = NULL, message = NULL, updated_at = clock_timestamp()
            WHERE tenant_id = v_tenant AND run_id = v_ticket.run_id AND state = 'awaiting_approval';
    END IF;
    IF v_state = 'denied' AND v_ticket.capability = 'provide_input' THEN
        PERFORM engine_end_ask_v1(v_ticket, NULL, 'input_denied',
            COALESCE('no input was given: ' || NULLIF(c ->> 'comment', ''), 'no input was given'));
    ELSIF v_state = 'approved' THEN
        v_scope := engine_leave_approval_scope_v2(v_ticket, v_run.agent_id, v_voter, (c ->> 'scope_id')::uuid);
    END IF;
    PERFORM engine_append_event_v1(v_tenant, 'run/' || v_ticket.run_id,
        CASE WHEN v_state IS NULL THEN 'approval_voted' ELSE 'approval_decided' END, c ->> 'actor', jsonb_strip_nulls(
        jsonb_build_object('ticket_id', v_id, 'step', v_ticket.step_index, 'attempt', v_ticket.attempt,
            'vote', c ->> 'vote', 'votes', v_votes, 'quorum', (c ->> 'quorum')::integer, 'authority', c -> 'authority',
            'decision', v_state, 'digest', v_ticket.digest, 'comment', NULLIF(c ->> 'comment', ''), 'scope', v_scope,
            'ticket_kind', CASE WHEN v_ticket.capability = 'provide_input' THEN 'input' END)));
    RETURN jsonb_build_object('status', CASE WHEN v_state IS NULL THEN 'counted' ELSE 'decided' END,
        'run_id', v_ticket.run_id, 'replayed', false, 'deliver', v_state IS NOT NULL);
END
$$;

-- The same of version 2, whose votes cannot end the step of an ask and are not counted on one.
CREATE OR REPLACE FUNCTION engine_refused_vote_v2(p_ticket approval_tickets, p_principal jsonb, c jsonb) RETURNS jsonb
LANGUAGE plpgsql STABLE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
    IF p_ticket.capability = 'provide_input' THEN
        RETURN jsonb_build_object('reason', 'ticket_kind',
            'message', 'the ticket asks for an input, which this release cannot take; give it to a newer one');
    ELSIF p_ticket.requested_by = (c ->> 'voter')::uuid OR COALESCE(p_principal -> 'delegated_by', '[]') ? (c ->> 'voter') THEN
        RETURN jsonb_build_object('reason', 'separation_of_duties',
            'message', 'the requester of a call cannot decide its approval, nor can who had it requested');
    ELSIF p_ticket.state = 'expired' THEN
        RETURN jsonb_build_object('reason', 'approval_expired',
            'message', format('the deadline %s has passed; the call is denied', p_ticket.deadline));
    ELSIF p_ticket.state <> 'pending' THEN
        RETURN jsonb_build_object('reason', 'already_decided',
            'message', format('the ticket is already %s', p_ticket.state));
    ELSIF (p_ticket.escalated_at IS NOT NULL) <> (c -> 'escalated')::boolean THEN
        RETURN jsonb_build_object('reason', 'escalated',
            'message', 'the ticket was handed on meanwhile; whoever decides it now needs another OAuth scope');
    ELSIF EXISTS (SELECT FROM approval_votes
                  WHERE tenant_id = p_ticket.tenant_id AND ticket_id = p_ticket.id AND voter = (c ->> 'voter')::uuid) THEN
        RETURN jsonb_build_object('reason', 'already_voted',
            'message', 'you have voted on this ticket before, the other way; a vote is given once');
    END IF;
    RETURN NULL;
END
$$;
